"""What is kept for backward, and what is made again: bytes against a plain MLP, gradients bit for bit."""

import pytest
import torch

from megatron_tf.config import parse_config
from megatron_tf.config.model import ModelConfig
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.parallelize import choose_computation
from megatron_tf.model.tokenformer import TokenFormer
from tests.support.training import PLAIN, STRONG

TOKENS, WIDTH, COUNT = 4096, 768, 3072


def saved_bytes(module, x):
    """Of tensors kept for backward that are not parameters, each storage once."""
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.fixture(scope="module")
def mlp_bytes():
    mlp = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, COUNT, bias=False), torch.nn.GELU(), torch.nn.Linear(COUNT, WIDTH, bias=False)
    )
    return saved_bytes(mlp, torch.randn(TOKENS, WIDTH, requires_grad=True))


@pytest.mark.parametrize(("norm", "share"), [("l2_norm_gelu", 0.6), ("gelu_l2_norm", 0.6), ("softmax", 0.7)])
def test_a_pattention_keeps_less_than_an_mlp(norm, share, mlp_bytes):
    layer = Pattention(WIDTH, WIDTH, num_tokens=COUNT, norm_activation=norm)
    torch.nn.init.normal_(layer.key_tokens)
    torch.nn.init.normal_(layer.value_tokens)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    assert mlp_bytes == 4 * TOKENS * (WIDTH + 2 * COUNT)
    assert saved_bytes(layer, x) <= share * mlp_bytes
    layer.recompute_scores = True
    assert saved_bytes(layer, x) <= 4 * TOKENS * (WIDTH + 2)  # x, and a number a row


def gradients(config, recompute, layer_dtype=torch.float32):
    torch.manual_seed(0)
    model = TokenFormer(config, dtype=layer_dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    choose_computation(model, Kernels(), recompute)
    ids = torch.arange(2 * 12).view(2, 12) % 60
    loss = model(ids, targets=ids, divisor=ids.numel())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", ["l2_norm_gelu", "gelu_l2_norm", "softmax", "transformer", "strong"])
def test_recomputation_changes_no_bit(layer, dtype):
    values = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 60, "ffn_tokens": 24}
    tokens = {"qkv_tokens": 20, "proj_tokens": 12, "norm_activation": layer}
    values |= {"transformer": PLAIN, "strong": STRONG}.get(layer, tokens)
    config = parse_config(ModelConfig, values, "test")
    expected = gradients(config, "none", dtype)
    for recompute in ("full",) if config.layer == "transformer" else ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(expected, gradients(config, recompute, dtype), strict=True))
