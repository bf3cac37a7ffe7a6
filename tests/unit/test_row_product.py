"""Products of a few rows against float64, and what they do not depend on."""

import pytest
import torch

from megatron_tf.kernels.row_product import MOST_ROWS, is_faster, multiply

# columns: whole blocks of 32, part of one, both; outputs for one thread and for several
SHAPES = [(64, 100), (31, 7), (77, 300), (768, 768)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns, outputs", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
@torch.no_grad()
def test_equal_to_float64(dtype, columns, outputs, rows):
    torch.manual_seed(0)
    x, weights = torch.randn(2, rows, columns).to(dtype), [torch.randn(outputs, columns).to(dtype) for _ in range(2)]
    assert is_faster(x, weights)
    wanted = torch.stack([a.double() @ w.double().t() for a, w in zip(x, weights, strict=True)])
    bound = 1e-6 * columns**0.5 if dtype == torch.float32 else 0.0
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((multiply(x, weights) - wanted).abs() <= bound + 1.01 * rounding + 1e-5).all()
    one_x = multiply(x[0], weights)
    assert torch.equal(one_x[0], multiply(x[:1], weights[:1])[0])
    assert torch.equal(one_x[1], multiply(x[0], weights[1:])[0])


@torch.no_grad()
def test_a_row_depends_on_no_other_and_not_on_threads():
    x, weight = torch.randn(MOST_ROWS, 768), torch.randn(2048, 768)
    together = multiply(x, [weight])[0]
    assert torch.equal(together, torch.cat([multiply(row[None], [weight])[0] for row in x]))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, multiply(x, [weight])[0])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_rounding_to_bf16_is_to_the_nearest_even_and_keeps_what_is_not_finite():
    values = torch.randn(4000) * 10.0 ** torch.randint(-30, 30, (4000,))
    whole = torch.cat([values, torch.tensor([torch.inf, torch.nan])]).bfloat16()
    copied = multiply(torch.ones(1, 1, dtype=torch.bfloat16), [whole[:, None]])[0, 0]
    assert torch.allclose(copied, whole, rtol=0.0, atol=0.0, equal_nan=True)
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie halfway between two bf16 numbers
    parts = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16()
    assert multiply(torch.ones(1, 2, dtype=torch.bfloat16), [parts])[0, 0].tolist() == [1.0, 1.015625]


def test_what_needs_gradients_or_is_not_contiguous_is_left_to_others():
    x, weight = torch.randn(2, 64), torch.randn(64, 64)
    assert not is_faster(x, [weight])
    with torch.no_grad():
        assert is_faster(x, [weight])
        assert not is_faster(x, [weight.t()])
        assert not is_faster(x, [weight.double()])
        assert not is_faster(torch.randn(MOST_ROWS + 1, 64), [weight])
