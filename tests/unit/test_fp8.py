"""fp8: each product against float64, of operands that were rounded elsewhere; then Pattentions, and a training run."""

import functools
import itertools

import pytest
import torch

from megatron_tf import pretrain
from megatron_tf.config import ConfigError
from megatron_tf.errors import UserError
from megatron_tf.kernels import fp8
from megatron_tf.kernels.fp8 import Fp8Products
from megatron_tf.kernels.products import PlainProducts
from megatron_tf.layers.pattention import Pattention, pattend
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.state import build_state
from tests.support.commands import make_run
from tests.support.inductor import require_inductor
from tests.support.training import small_run, training_run

SCALINGS = ("tensorwise", "rowwise")
SIDES = (None, "left", "right")
SHAPES = [(16, 32, 48), (64, 768, 128), (128, 16, 16), (32, 2064, 80)]
NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
CPU = torch.device("cpu")
ALIGNED = {"model": {"proj_tokens": 32}}


def operands(rows, inner, columns):
    generator = torch.Generator().manual_seed(rows + inner)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
    return a.bfloat16(), b.bfloat16()


def distance(got, want):
    """Relative to the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def rounded(x, scaling, kind, dim):
    """x as fp8 holds it, in float64."""
    largest = x.double().abs().max() if scaling == "tensorwise" else x.double().abs().amax(dim, keepdim=True)
    scale = largest / torch.finfo(kind).max
    return (x.double() / scale).float().to(kind).double() * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", SIDES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_product_is_that_of_the_rounded_operands(scaling, gradient, shape):
    a, b = operands(*shape)
    kinds = [torch.float8_e5m2 if gradient == side else torch.float8_e4m3fn for side in ("left", "right")]
    want = rounded(a, scaling, kinds[0], 1) @ rounded(b, scaling, kinds[1], 0)
    got = Fp8Products(scaling).mm(a, b, gradient=gradient)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous()
    assert distance(got, want) < 2**-8, "bf16 rounds the result once"
    out = torch.empty_like(got)
    assert Fp8Products(scaling).mm(a, b, gradient=gradient, out=out) is out
    assert torch.equal(out, got)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", SIDES)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("size", [1.0, 2.0**-30, 2.0**40])
def test_a_product_is_near_float64_whatever_the_size_of_its_operands(size, scaling, gradient, shape):
    a, b = operands(*shape)
    error = distance(Fp8Products(scaling).mm(a * size, b, gradient=gradient), (a * size).double() @ b.double())
    assert 0.01 < error < (0.05 if gradient is None else 0.08)


def test_a_scale_for_each_row_keeps_small_rows_and_columns():
    a, b = operands(64, 768, 128)
    a[:2] *= 2.0**-24
    b[:, :2] *= 2.0**-24
    want = a.double() @ b.double()
    by_row, by_tensor = (Fp8Products(scaling).mm(a, b) for scaling in ("rowwise", "tensorwise"))
    for part in ((slice(0, 2), slice(2, None)), (slice(2, None), slice(0, 2))):
        assert distance(by_row[part], want[part]) < 0.05
        assert distance(by_tensor[part], want[part]) > 0.5


def test_sums_are_added_to_what_is_there():
    a, b = operands(16, 32, 48)
    products, total = Fp8Products("rowwise"), torch.ones(16, 48, dtype=torch.bfloat16)
    products.add_mm(total, a, b, gradient="left")
    assert torch.equal(total, 1 + products.mm(a, b, gradient="left"))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zero_and_what_is_not_finite_is_seen(scaling):
    a, b = operands(32, 64, 16)
    a[3] = 0
    assert not Fp8Products(scaling).mm(a, b)[3].any()
    assert not Fp8Products(scaling).mm(a * 0, b).any()
    for bad in (float("nan"), float("inf")):
        a[5, 7] = bad
        assert not Fp8Products(scaling).mm(a, b)[5].isfinite().any()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("gradient", SIDES)
def test_what_goes_to_the_hardware_is_laid_out_as_it_reads_it(scaling, gradient, monkeypatch):
    """And torch's own operator, which a CPU has too, gives the same product of it."""
    seen, plain = [], fp8.scaled_mm

    def watch(a, b, a_scale, b_scale, *, out, is_forward):
        plain(a, b, a_scale, b_scale, out=out, is_forward=is_forward)
        seen.append((a, b, a_scale, b_scale, out.clone(), is_forward))

    monkeypatch.setattr(fp8, "scaled_mm", watch)
    Fp8Products(scaling).mm(*operands(64, 96, 48), gradient=gradient)
    ((a, b, a_scale, b_scale, out, is_forward),) = seen
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert b.dtype == torch.float8_e4m3fn
    assert a.dtype == (torch.float8_e4m3fn if gradient is None else torch.float8_e5m2)
    assert is_forward == (gradient is None)
    assert a_scale.dtype == b_scale.dtype == torch.float32
    rows, columns = out.shape
    shapes = ((), ()) if scaling == "tensorwise" else ((rows, 1), (1, columns))
    assert (a_scale.shape, b_scale.shape) == shapes
    assert a_scale.is_contiguous()
    assert b_scale.is_contiguous()
    own = torch.empty_like(out)
    torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=out.dtype, use_fast_accum=is_forward, out=own)
    assert distance(own, out) < 2**-8


@pytest.mark.parametrize("shape", [(15, 32, 48), (16, 33, 48), (16, 32, 40)], ids=str)
@pytest.mark.parametrize("gradient", SIDES)
def test_sizes_that_fp8_has_not_stay_in_bf16(gradient, shape):
    a, b = operands(*shape)
    assert torch.equal(Fp8Products("rowwise").mm(a, b, gradient=gradient), a @ b)


def test_products_of_many_kinds_and_shapes_stay_within_the_limit_of_recompilations(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    fp8._compiled_quantize.cache_clear()
    for scaling, gradient, dtype in itertools.product(SCALINGS, SIDES, (torch.bfloat16, torch.float32)):
        compiled, plain = (Fp8Products(scaling, is_compiled=found) for found in (True, False))
        for shape, *is_transposed in itertools.product([*SHAPES, (32, 32, 32)], (False, True), (False, True)):
            pair = [
                (x.t().contiguous().t() if is_column_major else x).to(dtype)
                for x, is_column_major in zip(operands(*shape), is_transposed, strict=True)
            ]
            want = plain.mm(*pair, gradient=gradient)
            for requires_grad in (False, True):
                a, b = (x.clone().requires_grad_(requires_grad) for x in pair)
                with torch.no_grad():
                    assert torch.equal(compiled.mm(a, b, gradient=gradient), want)
    fp8._compiled_quantize.cache_clear()


@pytest.mark.slow
def test_compiled_scaling_and_rounding_are_those_of_torch():
    require_inductor()
    for scaling in SCALINGS:
        for shape in [*SHAPES, (48, 144, 16), (16, 64, 512), (272, 32, 96)]:
            for gradient in SIDES:
                a, b = operands(*shape)
                compiled, plain = (Fp8Products(scaling, is_compiled=found) for found in (True, False))
                assert torch.equal(compiled.mm(a, b, gradient=gradient), plain.mm(a, b, gradient=gradient))


def pattention_and_gradients(norm, sizes, dtype, products=None):
    tokens, width, parameters, width_out = sizes
    torch.manual_seed(tokens)
    layers = [Pattention(width, width_out, num_tokens=parameters, norm_activation=norm) for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.key_tokens, std=0.02)
        torch.nn.init.normal_(layer.value_tokens, std=0.02)
        layer.bfloat16().to(dtype)  # the same numbers in both types
        layer.products = products or layer.products
    x, dy = (torch.randn(*shape).bfloat16().to(dtype) for shape in ((tokens, width), (2, tokens, width_out)))
    x.requires_grad_()
    y = pattend(x, layers)
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


class Recorder(PlainProducts):
    """Notes which operand of each product is a gradient."""

    def __init__(self):
        self.sides = []

    def mm(self, a, b, *, out=None, gradient=None):
        self.sides.append(gradient)
        return super().mm(a, b, out=out)

    def add_mm(self, total, a, b, *, gradient=None):
        self.sides.append(gradient)
        super().add_mm(total, a, b)

    def mix(self, weights, values, *, out):
        self.sides.append("mix")
        super().mix(weights, values, out=out)


def test_a_pattention_says_which_operands_are_gradients():
    recorder = Recorder()
    pattention_and_gradients("l2_norm_gelu", (16, 8, 32, 8), torch.float64, recorder)
    scores, y, d_weights = [None] * 2, ["mix"] * 2, ["left"] * 2
    dx, d_keys, d_values = ["left"] * 2, ["left"] * 2, ["right"] * 2
    assert recorder.sides == [*scores, *y, *d_weights, *dx, *d_values, *d_keys]


@pytest.mark.parametrize("sizes", [(64, 32, 96, 48), (256, 64, 512, 64)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_pattention_and_its_gradients_are_near_float64(scaling, norm, sizes):
    want = pattention_and_gradients(norm, sizes, torch.float64)
    got = pattention_and_gradients(norm, sizes, torch.bfloat16, Fp8Products(scaling))
    errors = [distance(g, w) for g, w in zip(got, want, strict=True)]
    assert errors[0] < 0.06, errors
    assert max(errors[1:]) < 0.11, errors


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_training_run_stays_near_that_of_bf16(scaling, recompute):
    training = {"fp8_scaling": scaling, "recompute_granularity": recompute}
    curves = [
        training_run(Mesh(CPU), small_run(training=training | {"precision": precision}, **ALIGNED), 12)[0]
        for precision in ("bf16", "fp8")
    ]
    bf16, in_fp8 = (torch.tensor(curve) for curve in curves)
    assert not torch.equal(bf16, in_fp8)
    torch.testing.assert_close(in_fp8[:, 0], bf16[:, 0], rtol=5e-3, atol=0)
    torch.testing.assert_close(in_fp8[0, 1], bf16[0, 1], rtol=0.05, atol=0)  # the runs part with every step


def test_sizes_that_stay_in_bf16_are_listed():
    aligned = build_state(small_run(training={"precision": "fp8"}, **ALIGNED), Mesh(CPU))
    assert aligned.kernels.not_in_fp8 == ""
    mixed = small_run(training={"precision": "fp8", "seq_length": 24}, model={"ffn_tokens": [64, 72, 64]})
    assert build_state(mixed, Mesh(CPU)).kernels.not_in_fp8 == (
        "training.precision=fp8: products over tokens of a micro-batch (24), proj tokens of a rank (24), ffn tokens of "
        "a rank (72) stay in bf16: fp8 needs multiples of 16"
    )


@pytest.mark.slow
def test_a_run_says_once_what_stays_in_bf16(tmp_path, capsys):
    make_run(tmp_path, training={"train_iters": 3, "precision": "fp8"})
    assert pretrain.main([str(tmp_path / "run.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: training.precision=fp8: products over ") == 1
    assert "proj tokens of a rank (24)" in out


def test_a_plain_transformer_has_none():
    with pytest.raises(ConfigError, match=r"training.precision=fp8 needs model.layer=tokenformer: choose bf16"):
        small_run(
            training={"precision": "fp8"}, model={"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
        )


def test_a_gpu_that_has_no_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    for capability, is_refused in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if is_refused:
            with pytest.raises(UserError, match=r"A100-SXM4-80GB does not support fp8.*: set bf16"):
                fp8.choose_products("rowwise", torch.device("cuda"), is_compiled=True)
        else:
            assert fp8.choose_products("rowwise", torch.device("cuda"), is_compiled=True).is_compiled
