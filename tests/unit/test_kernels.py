"""The kernels between a Pattention's products: compiled against eager in float64, and what can be chosen."""

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import choose_kernels
from megatron_tf.tokenformer.normalisation import NORMALISATIONS
from tests.support.inductor import require_inductor

ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def compiler():
    """Every case compiles anew: torch limits how often one function is compiled."""
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("norm", NORMALISATIONS.values(), ids=NORMALISATIONS.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["one rank", "shared"])
def test_compiled_equals_eager_in_float64(norm, dtype, shared):
    require_inductor()
    reduce = (lambda values: values * 1) if shared else None
    torch.manual_seed(0)
    scores, grad = torch.randn(9, 70).to(dtype), torch.randn(9, 70).to(dtype)
    tau = torch.full((9,), 70**0.5, dtype=torch.float64)
    wide_scores, wide_grad = scores.double(), grad.double()
    factor, weights = CompiledKernels().forward(norm, scores, tau, reduce)
    expected_factor, expected = EagerKernels().forward(norm, wide_scores, tau, None)
    torch.testing.assert_close(factor.double(), expected_factor, rtol=1e-5, atol=1e-5)
    assert (weights.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    _, grad = CompiledKernels().backward(norm, scores, factor, grad, tau, reduce)
    _, wide_grad = EagerKernels().backward(norm, wide_scores, expected_factor, wide_grad, tau, None)
    assert (grad.double() - wide_grad).abs().max() <= ROUNDING[dtype] * wide_grad.abs().max()


def test_what_a_cpu_can_choose():
    cpu = torch.device("cpu")
    assert choose_kernels("auto", cpu).name == "eager"
    assert choose_kernels("compiled", cpu).name == "compiled"
    with pytest.raises(
        UserError, match=r"kernels\.pattention=triton( needs a GPU|: .*pip install 'megatron_tf\[gpu\]')"
    ):
        choose_kernels("triton", cpu)
