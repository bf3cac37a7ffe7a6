"""Backward of a Pattention in two passes: the same bits, every product once, and what is kept between the passes."""

from functools import partial

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.config import parse_config
from megatron_tf.config.model import ModelConfig
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.parallelize import choose_computation
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.training.dry_run.memory import StorageMeter
from tests.support.training import PLAIN, STRONG

MODEL = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 60, "ffn_tokens": 24}
TOKENS = {"qkv_tokens": 20, "proj_tokens": 12}
PATTENTIONS = 5  # in a layer
PRODUCTS = {"mm", "addmm_", "addmm"}


class ProductCounter(TorchDispatchMode):
    """Counts matrix products outside attention, which multiplies batches of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS
        return func(*args, **(kwargs or {}))


def stage_of(config, layers, recompute="none", dtype=torch.float32, *, splits_backward):
    torch.manual_seed(0)
    stage = TokenFormer(config, layers, dtype=dtype)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    choose_computation(stage, Kernels(), recompute, splits_backward=splits_backward)
    return stage


def run(stage, x, *, in_two_passes, scale=1.0):
    """(gradients of x and of the parameters, products of each pass) of the loss, or of a sum for an inner stage."""
    ids = torch.arange(2 * 12).view(2, 12) % 60
    x = x.clone().requires_grad_()
    y = stage(x, targets=ids, divisor=ids.numel())
    grad = torch.full_like(y, scale) if y.dim() == 0 else torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    counts = []
    if in_two_passes:
        with ProductCounter() as counter:
            (dx,), groups = stage_backward_input([y], [grad], [x], stage.parameters())
        counts.append(counter.count)
        with ProductCounter() as counter:
            stage_backward_weight(stage.parameters(), groups)
        counts.append(counter.count)
    else:
        with ProductCounter() as counter:
            y.backward(grad)
        counts.append(counter.count)
        dx = x.grad
    return [dx, *(parameter.grad for parameter in stage.parameters())], counts


def model_config(layer="l2_norm_gelu"):
    values = MODEL | {"transformer": PLAIN, "strong": STRONG}.get(layer, TOKENS | {"norm_activation": layer})
    return parse_config(ModelConfig, values | {"untie_embeddings_and_output_weights": True}, "test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layers", [range(1, 2), range(1, 3)], ids=["inner", "last"])
@pytest.mark.parametrize("layer", ["l2_norm_gelu", "gelu_l2_norm", "softmax", "transformer", "strong"])
def test_two_passes_change_no_bit(layer, layers, recompute, dtype):
    config = model_config(layer)
    if recompute == "selective" and config.layer == "transformer":
        return
    x = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole, _ = run(stage_of(config, layers, recompute, dtype, splits_backward=False), x, in_two_passes=False, scale=4)
    halves, _ = run(stage_of(config, layers, recompute, dtype, splits_backward=True), x, in_two_passes=True, scale=4)
    for a, b in zip(whole, halves, strict=True):
        assert torch.equal(a, b)


def test_the_scale_of_the_loss_is_applied_once():
    x = torch.randn(12, 2, 16)
    stage = partial(stage_of, model_config(), range(2, 3), splits_backward=True)
    once, scaled = (run(stage(), x, in_two_passes=True, scale=scale)[0] for scale in (1.0, 4.0))
    assert all(torch.equal(4 * a, b) for a, b in zip(once, scaled, strict=True))


@pytest.mark.parametrize(("recompute", "first", "second"), [("none", 2, 2), ("selective", 4, 1), ("full", 5, 1)])
def test_every_product_runs_once(recompute, first, second):
    """Of the four of a Pattention: two or three in the first pass, the others in the second; selective recomputes the
    scores, and full both products of forward."""
    config = model_config()
    stage = stage_of(config, range(1, 2), recompute, splits_backward=True)
    _, counts = run(stage, torch.randn(12, 2, 16), in_two_passes=True)
    whole = stage_of(config, range(1, 2), recompute, splits_backward=True)
    _, together = run(whole, torch.randn(12, 2, 16), in_two_passes=False)
    assert counts == [PATTENTIONS * first, PATTENTIONS * second]
    assert together == [sum(counts)]


def test_products_of_the_last_stage_run_once():
    """The gradients of the head come from its forward."""
    stage = stage_of(model_config(), range(2, 3), splits_backward=True)
    assert run(stage, torch.randn(12, 2, 16), in_two_passes=True)[1] == [PATTENTIONS * 2, PATTENTIONS * 2]


class Observed(TorchDispatchMode):
    """Shows a meter every result."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.meter.see(result)
        return result


@pytest.mark.parametrize(
    ("split", "recompute", "kept"), [("2:2", False, 1), ("3:1", False, 0), ("2:2", True, 2), ("3:1", True, 1)]
)
def test_what_a_pattention_keeps_between_the_passes(split, recompute, kept):
    """In tensors of the size of the scores, more than before backward; also dy (2:2), or the gradient of V (3:1)."""
    tokens, width, count = 64, 8, 128
    layer = Pattention(width, width, num_tokens=count)
    layer.backward_split, layer.recompute_scores = split, recompute
    x, dy = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    meter = StorageMeter(torch.device("cpu"), [x, dy, *layer.parameters()])
    with Observed(meter), meter.following_resizes():
        y = layer(x)
        before = meter.bytes
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        after = meter.bytes - dx.nbytes
    also = width * count if split == "3:1" else width * tokens
    assert after - before == 4 * (kept * tokens * count + also)
    d_tokens = torch.autograd.grad(y, list(layer.parameters()), dy)
    layer.backward_split = None
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    assert all(torch.equal(a, b) for a, b in zip((dx, *d_tokens), expected, strict=True))


def test_without_a_split_gradients_can_be_taken_again():
    layer, x = Pattention(8, 8, num_tokens=16), torch.randn(4, 8, requires_grad=True)
    y = layer(x)
    wanted = [x, *layer.parameters()]
    one_by_one = [torch.autograd.grad(y.sum(), tensor, retain_graph=True)[0] for tensor in wanted]
    together = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    twice = torch.autograd.grad(2 * y.sum(), wanted)
    assert all(torch.equal(2 * a, b) for a, b in zip(together, twice, strict=True))


def test_the_gradient_of_the_input_alone_costs_two_products():
    layer, x = Pattention(8, 8, num_tokens=16), torch.randn(4, 8, requires_grad=True)
    y = layer(x)
    with ProductCounter() as counter:
        torch.autograd.grad(y.sum(), x)
    assert counter.count == 2
