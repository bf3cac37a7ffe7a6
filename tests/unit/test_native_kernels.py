"""The C++ kernels between a Pattention's products: against float64, and what their bits do not depend on."""

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import choose_pattention
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.native import NativeKernels
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from tests.support.hard_scores import LENGTHS, check_kernels

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def same(values):
    return values * 1


def draw(rows, tokens, dtype=torch.float32, spread=1.0):
    """Scores, and the gradient of their weights."""
    generator = torch.Generator().manual_seed(tokens)
    scores, grad = (torch.randn(rows, tokens, generator=generator) for _ in range(2))
    return (spread * scores).to(dtype), grad.to(dtype)


def compute(norm, scores, grad, reduce=None):
    """Factor, weights and the gradient of the scores."""
    tau = torch.linspace(4.0, 9.0, len(scores))
    factor, weights = NativeKernels().forward(norm, scores, tau=tau, reduce=reduce)
    again, d_scores = NativeKernels().backward(norm, scores, factor=factor, grad=grad.clone(), tau=tau, reduce=reduce)
    torch.testing.assert_close(again, weights, rtol=0.0, atol=0.0, equal_nan=True)
    return factor, weights, d_scores


@pytest.fixture(autouse=True)
def no_eager(monkeypatch):
    """Nothing here is left to the eager kernels."""
    monkeypatch.delattr(EagerKernels, "forward")
    monkeypatch.delattr(EagerKernels, "backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("reduce", [None, same], ids=["whole", "shared"])
@pytest.mark.parametrize("n", LENGTHS)
def test_scores_far_from_zero_equal_float64(norm, dtype, reduce, n):
    check_kernels(NativeKernels(), norm, n, dtype, reduce=reduce)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize(("old", "new"), [(1, 2), (3, 40), (31, 33), (32, 33), (64, 256), (100, 101), (129, 4096)])
def test_appended_tokens_of_score_zero_change_no_bit(norm, dtype, old, new):
    scores, grad = draw(5, new, dtype)
    scores[:, old:] = 0
    before = compute(NORMALIZATIONS[norm], scores[:, :old].contiguous(), grad[:, :old].contiguous())
    # the gradient of a new score is not zero, but what it adds to the row's sum is
    after = compute(NORMALIZATIONS[norm], scores, grad)
    assert torch.equal(after[0], before[0])
    for found, expected in zip(after[1:], before[1:], strict=True):
        assert torch.equal(found[:, :old], expected)
    assert not after[1][:, old:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
def test_a_row_depends_on_no_other_and_not_on_threads(norm, dtype):
    scores, grad = draw(64, 1030, dtype)
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found[count] = compute(norm, scores, grad)
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found.values(), strict=True):
        assert torch.equal(one, three)
    tau = torch.linspace(4.0, 9.0, 64)[7:8]
    factor, weights = NativeKernels().forward(norm, scores[7:8], tau=tau, reduce=None)
    assert torch.equal(factor, found[1][0][7:8])
    assert torch.equal(weights, found[1][1][7:8])


@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
def test_one_rank_and_several_agree_in_fp32(norm):
    scores, grad = draw(9, 70)
    _, weights, d_scores = compute(norm, scores, grad)
    _, shared, d_shared = compute(norm, scores, grad, same)
    torch.testing.assert_close(shared, weights, rtol=1e-6, atol=1e-7)  # torch takes the root elsewhere
    torch.testing.assert_close(d_shared, d_scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMALIZATIONS.values(), ids=NORMALIZATIONS.keys())
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(norm, dtype, bad):
    scores, grad = draw(3, 50, dtype)
    clean = compute(norm, scores, grad)
    scores[1, 20] = bad
    for found, expected in zip(compute(norm, scores, grad), clean, strict=True):
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not compute(norm, scores, grad)[2][1].isfinite().all()


def test_a_gradient_that_is_not_finite_stays_so():
    scores, grad = draw(2, 40)
    grad[0, 39] = torch.nan
    d_scores = compute(NORMALIZATIONS["l2_norm_gelu"], scores, grad)[2]
    assert d_scores[0].isnan().all()
    assert d_scores[1].isfinite().all()


def test_what_a_cpu_can_choose():
    for dtype in DTYPES:
        assert choose_pattention("auto", CPU, dtype).name == "native"
    for dtype in (torch.float16, torch.float64):
        assert choose_pattention("auto", CPU, dtype).name == "eager"
        with pytest.raises(
            UserError, match=r"kernels\.pattention=native needs a CPU and training\.precision fp32 or bf16"
        ):
            choose_pattention("native", CPU, dtype)
    with pytest.raises(UserError, match="native needs a CPU"):
        choose_pattention("native", torch.device("cuda"), torch.float32)
