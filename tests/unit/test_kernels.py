"""The kernels between a Pattention's products: compiled against eager in float64, and what can be chosen."""

import functools
from dataclasses import replace

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.kernels import compiled
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.dispatch import Kernels, choose_decoding_kernels, choose_pattention
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.native import NativeKernels
from megatron_tf.kernels.row_product import MAX_ROWS, DecodingKernels
from megatron_tf.layers.pattention import Pattention
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from tests.support.hard_scores import LENGTHS, check_kernels
from tests.support.hard_scores import ROUNDING as UNITS
from tests.support.inductor import require_inductor
from tests.support.models import random_model

ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def compiler():
    """Every case compiles again: torch limits how often one function is compiled."""
    torch.compiler.reset()


def test_many_shapes_types_and_normalizations_stay_within_the_limit_of_recompilations(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled._compiled.cache_clear()
    kernels = CompiledKernels()
    for norm in NORMALIZATIONS.values():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((3, 64), (3, 96), (8, 96), (8, 100), (5, 7)):
                tau, scores = torch.ones(shape[0]), torch.ones(shape, dtype=dtype)
                factor, weights = kernels.forward(norm, scores, tau=tau, reduce=None)
                kernels.backward(norm, scores, factor=factor, grad=weights, tau=tau, reduce=None)
    compiled._compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
def test_rows_of_one_rank_have_the_bits_of_shared_ones(norm, dtype):
    scores = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    tau = torch.linspace(4.0, 9.0, 9, dtype=torch.float64)
    whole = EagerKernels().forward(norm, scores, tau=tau, reduce=None)
    shared = EagerKernels().forward(norm, scores, tau=tau, reduce=lambda statistic: statistic)
    for found, expected in zip(whole, shared, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["one rank", "shared"])
def test_compiled_equals_eager_in_float64(norm, dtype, shared):
    require_inductor()
    reduce = (lambda values: values * 1) if shared else None
    torch.manual_seed(0)
    scores, grad = torch.randn(9, 70).to(dtype), torch.randn(9, 70).to(dtype)
    tau = torch.full((9,), 70**0.5, dtype=torch.float64)
    wide_scores, wide_grad = scores.double(), grad.double()
    factor, weights = CompiledKernels().forward(norm, scores, tau=tau, reduce=reduce)
    expected_factor, expected = EagerKernels().forward(norm, wide_scores, tau=tau, reduce=None)
    torch.testing.assert_close(factor.double(), expected_factor, rtol=1e-5, atol=1e-5)
    assert (weights.double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    _, grad = CompiledKernels().backward(norm, scores, factor=factor, grad=grad, tau=tau, reduce=reduce)
    _, wide_grad = EagerKernels().backward(
        norm, wide_scores, factor=expected_factor, grad=wide_grad, tau=tau, reduce=None
    )
    assert (grad.double() - wide_grad).abs().max() <= ROUNDING[dtype] * wide_grad.abs().max()


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("reduce", [None, lambda values: values * 1], ids=["whole", "shared"])
@pytest.mark.parametrize("n", LENGTHS)
def test_eager_scores_far_from_zero_equal_float64(norm, dtype, reduce, n):
    # torch.linalg.vector_norm adds the squares of a row in order on a CPU, which loses 1e-5 of 65,536 in fp32
    lost = 2**-31 if dtype == torch.float32 and norm.name == "l2_norm_gelu" else 0.0
    check_kernels(EagerKernels(), norm, n, dtype, reduce=reduce, lost_per_token=lost)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("n", [1, 2140])
def test_compiled_scores_far_from_zero_equal_float64(norm, dtype, n):
    require_inductor()
    check_kernels(CompiledKernels(), norm, n, dtype)


def test_what_a_cpu_can_choose():
    cpu = torch.device("cpu")
    assert choose_pattention("compiled", cpu, torch.float32).name == "compiled"
    assert choose_pattention("eager", cpu, torch.float32).name == "eager"
    with pytest.raises(UserError, match=r"kernels\.pattention=triton( needs a GPU|: .*pip install '\.\[gpu\]')"):
        choose_pattention("triton", cpu, torch.float32)


def test_a_model_computes_with_the_kernels_that_are_chosen_for_it():
    model = random_model().transformer
    model.use(replace(choose_decoding_kernels(torch.device("cpu")), linear=lambda x, weight: x.new_ones(1)))
    assert {type(layer.kernels) for layer in model.pattentions().values()} == {DecodingKernels}
    assert torch.equal(model.embedding.logits(torch.zeros(2, 1, model.config.hidden_size)), torch.ones(1))
    model.use(Kernels())
    assert {type(layer.kernels) for layer in model.pattentions().values()} == {NativeKernels}
    assert model.embedding.logits(torch.zeros(2, 1, model.config.hidden_size)).shape[:2] == (2, 1)


def test_only_decoding_kernels_compute_a_whole_pattention_and_only_of_a_few_rows_without_gradients(monkeypatch):
    layer, parts = Pattention(32, 32, num_tokens=40, norm_activation="softmax"), []
    for parameter in layer.parameters():
        parameter.data = torch.randn(40, 32)
    layer.use(DecodingKernels())
    monkeypatch.setattr(NativeKernels, "forward", count_calls(NativeKernels.forward, parts))
    monkeypatch.setattr(CompiledKernels, "forward", NativeKernels.forward)
    monkeypatch.setattr(EagerKernels, "forward", NativeKernels.forward)
    with torch.no_grad():
        whole = layer(torch.ones(MAX_ROWS[torch.float32], 32))
        assert not parts
        layer(torch.ones(MAX_ROWS[torch.float32] + 1, 32))
        assert len(parts) == 1
        for kernels in (CompiledKernels(), EagerKernels()):
            layer.use(kernels)
            torch.testing.assert_close(layer(torch.ones(MAX_ROWS[torch.float32], 32)), whole)
        assert len(parts) == 3
    layer.use(DecodingKernels())
    assert layer(torch.ones(MAX_ROWS[torch.float32], 32)).requires_grad
    assert len(parts) == 4


def count_calls(function, calls):
    """The function, which adds to `calls` whenever it is called."""

    def counted(*arguments, **options):
        calls.append(function)
        return function(*arguments, **options)

    return counted
