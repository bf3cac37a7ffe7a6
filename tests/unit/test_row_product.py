"""Products and Pattentions of a few rows against float64, and what they do not depend on."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.kernels.row_product import MAX_ROWS, is_for_rows, linear, multiply_rows, pattend_rows
from megatron_tf.tokenformer.normalization import NORMALIZATIONS

DTYPES = [torch.float32, torch.bfloat16]
# columns: whole blocks of 32, part of one, both; outputs for one thread and for several, not all divided by streams
SHAPES = [(64, 100), (31, 7), (33, 2), (77, 300), (768, 768)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, outputs", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 12])
@torch.no_grad()
def test_products_equal_float64(dtype, columns, outputs, rows):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, columns).to(dtype), torch.randn(outputs, columns).to(dtype)
    assert is_for_rows(x, [weight])
    wanted = x.double() @ weight.double().t()
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((multiply_rows(x, weight) - wanted).abs() <= 1.01 * rounding + 1e-6 * columns**0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMALIZATIONS)
@pytest.mark.parametrize("rows, width, tokens, out", [(1, 64, 96, 64), (3, 77, 31, 50), (12, 768, 768, 768)])
@torch.no_grad()
def test_pattentions_equal_float64(dtype, norm, rows, width, tokens, out):
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(dtype)
    keys = [(torch.randn(tokens, width) * 3 / width**0.5).to(dtype) for _ in range(2)]
    values, taus = [torch.randn(out, tokens).to(dtype) for _ in range(2)], [5.0, tokens**0.5]
    found, definition = pattend_rows(norm, x, keys=keys, columns=values, taus=taus), NORMALIZATIONS[norm]
    for y, key, value, tau in zip(found, keys, values, taus, strict=True):
        scores = x.double() @ key.double().t()
        factor = definition.factor(definition.statistic(scores), torch.full((rows,), tau, dtype=torch.float64))
        wanted = definition.weights(scores, factor[:, None]) @ value.double().t()
        rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
        assert ((y - wanted).abs() <= 1.01 * rounding + 2e-6 * wanted.abs().max()).all()


@torch.no_grad()
def test_scores_of_zero_and_large_ones_are_no_trouble():
    x, keys, values = torch.zeros(1, 32), [torch.ones(40, 32)], [torch.ones(8, 40)]
    for norm, wanted in (("l2_norm_gelu", 0.0), ("gelu_l2_norm", 0.0), ("softmax", 3.0)):
        attend = partial(pattend_rows, norm, keys=keys, columns=values, taus=[3.0])
        assert attend(x).flatten().tolist() == pytest.approx([wanted] * 8)
        assert attend(x + 1e4).isfinite().all()
        assert attend(x * torch.nan).isnan().all()


@torch.no_grad()
def test_a_row_depends_on_no_other_and_not_on_threads():
    x, weight = torch.randn(MAX_ROWS[torch.float32], 768), torch.randn(2048, 768)
    attend = partial(pattend_rows, "l2_norm_gelu", keys=[weight], columns=[weight.t().contiguous()], taus=[9.0])
    together, attended = multiply_rows(x, weight), attend(x)[0]
    assert torch.equal(together, torch.cat([multiply_rows(row[None], weight) for row in x]))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, multiply_rows(x, weight))
        again = [attend(row[None])[0] for row in x]
        assert torch.equal(attended, torch.cat(again))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_rounding_to_bf16_is_to_the_nearest_even_and_keeps_what_is_not_finite():
    values = torch.randn(4000) * 10.0 ** torch.randint(-30, 30, (4000,))
    whole = torch.cat([values, torch.tensor([torch.inf, torch.nan])]).bfloat16()
    copied = multiply_rows(torch.ones(1, 1, dtype=torch.bfloat16), whole[:, None])[0]
    assert torch.allclose(copied, whole, rtol=0.0, atol=0.0, equal_nan=True)
    # 1 + 2^-8 and 1 + 3 * 2^-8 are halfway between two bf16 numbers
    parts = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16()
    assert multiply_rows(torch.ones(1, 2, dtype=torch.bfloat16), parts)[0].tolist() == [1.0, 1.015625]


def test_what_needs_gradients_or_is_not_contiguous_is_left_to_others():
    x, weight = torch.randn(2, 64), torch.randn(64, 64)
    assert not is_for_rows(x, [weight])
    with torch.no_grad():
        assert is_for_rows(x, [weight])
        assert not is_for_rows(x, [weight, weight.t()])
        assert not is_for_rows(x, [weight.double()])
        for dtype, rows in MAX_ROWS.items():
            assert is_for_rows(torch.randn(rows, 64).to(dtype), [weight.to(dtype)])
            assert not is_for_rows(torch.randn(rows + 1, 64).to(dtype), [weight.to(dtype)])


def test_a_linear_map_takes_the_product_of_few_rows_only_where_it_may():
    x, weight = torch.randn(2, MAX_ROWS[torch.float32], 768), torch.randn(300, 768)
    few = x[:1]
    with torch.no_grad():
        assert torch.equal(linear(few, weight)[0], multiply_rows(few[0], weight))
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(few, weight.requires_grad_()), F.linear(few, weight))
    assert linear(few, weight).requires_grad
