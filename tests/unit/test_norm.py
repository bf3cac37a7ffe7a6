"""RMSNorm in 16 bits, kernels and FLOPs of norms, and choices that a model does not have."""

import pytest
import torch

from megatron_tf.config import ConfigError
from megatron_tf.layers.norm import RMSNorm
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.sizes import layer_flops, parameter_count
from tests.support import textbook
from tests.support.training import PLAIN, STRONG, small_run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_rms_norm_in_16_bits_rounds_once(dtype):
    """Mean squares of 16-bit activations above 256 overflow in fp16, and lose half of their digits in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = (300 * torch.randn(5, 3, 64, generator=generator)).to(dtype)
    norm = RMSNorm(64, 1e-5)
    with torch.no_grad():
        norm.weight.copy_((1 + torch.randn(64, generator=generator)).to(dtype))
    exact = textbook.rms_norm(x.double(), norm.weight.double(), 1e-5)
    found = norm(x)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= (exact.to(dtype).double() - exact).abs().max()


def test_kernels_of_layer_norms_are_used_where_there_are_layer_norms():
    def counted(keys):
        model = TokenFormer(small_run(model=dict(keys)).model)
        return sum(hasattr(module, "normalize") for module in model.modules())

    assert counted({}) == 2 * 3 + 1
    assert counted(STRONG) == 0
    for kernel in ("apex", "transformer_engine"):
        with pytest.raises(
            ConfigError, match=rf"kernels.norm={kernel} computes layer norms only: choose auto or torch"
        ):
            small_run(model=dict(STRONG), kernels={"norm": kernel})


@pytest.mark.parametrize("key", ["norm", "mlp", "qk_norm"])
def test_a_tokenformer_refuses_choices_of_the_plain_transformer(key):
    with pytest.raises(ConfigError, match=rf"{key}={STRONG[key]} needs layer: transformer"):
        small_run(model={key: STRONG[key]})


def test_flops_count_the_gate_and_no_norm():
    plain, strong = (small_run(model=dict(keys)).model for keys in (PLAIN, STRONG))
    assert layer_flops(strong, 0, 16) - layer_flops(plain, 0, 16) == 2 * 64 * 32
    assert parameter_count(strong) - parameter_count(plain) == 3 * (64 * 32 + 2 * 32 + 2 * 8) - 32
