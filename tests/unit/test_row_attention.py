"""Attention of a few tokens over a cache against float64, and what it does not depend on."""

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.kernels.row_attention import MAX_TOKENS, attend, is_for_rows
from megatron_tf.layers.cache import KeyValueCache

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# heads of parts of a block of 32 columns, of whole ones, and of both
DIMS = [2, 16, 64, 80, 128]
# tokens of each sample in the cache, and new ones: fewer than the streams of a product, and not a multiple of them
LENGTHS = [([0], 1), ([1, 5], 2), ([37], 1), ([130, 0, 31], 3), ([6, 6], MAX_TOKENS)]


def draw(dtype, past, tokens, dim, *, heads=3, capacity=160, spread=1.0):
    """New q, k, v, and a cache that is NaN where nothing was stored."""
    generator = torch.Generator().manual_seed(dim + tokens)
    qkv = torch.randn(3, tokens, len(past), heads, dim, generator=generator)
    cache = torch.randn(2, len(past), heads, capacity, dim, generator=generator)
    for sample, length in enumerate(past):
        cache[:, sample, :, length:] = torch.nan
    return (spread * qkv).to(dtype), (spread * cache).to(dtype)


def in_float64(qkv, cache, past):
    """Each token of each sample over those before it, one by one."""
    (q, k, v), out = qkv.double(), torch.empty_like(qkv[0], dtype=torch.float64)
    for sample, length in enumerate(past):
        for token in range(len(q)):
            keys, values = (
                torch.cat([old[sample, :, :length], new[: token + 1, sample].transpose(0, 1)], 1)
                for old, new in zip(cache.double(), (k, v), strict=True)
            )
            query = q[token, sample][:, None]
            out[token, sample] = F.scaled_dot_product_attention(query, keys, values)[:, 0]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("past", "tokens"), LENGTHS)
@torch.no_grad()
def test_attention_equals_float64_and_stores_keys_and_values(dtype, dim, past, tokens):
    qkv, cache = draw(dtype, past, tokens, dim)
    wanted, (q, k, v) = in_float64(qkv, cache, past), qkv
    assert is_for_rows(q, cache[0])
    found = attend(q, k, v, keys=cache[0], values=cache[1], past=past)
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((found - wanted).abs() <= 1.01 * rounding + 2e-6).all()
    for sample, length in enumerate(past):
        for stored, new in zip(cache, (k, v), strict=True):
            assert torch.equal(stored[sample, :, length : length + tokens], new[:, sample].transpose(0, 1))
            assert stored[sample, :, length + tokens :].isnan().all()


@pytest.mark.parametrize("spread", [0.0, 30.0, 1e4])
@torch.no_grad()
def test_equal_and_very_different_scores(spread):
    """The softmax of the largest ones is one key's value."""
    (q, k, v), cache = draw(torch.float32, [90], 1, 64, spread=spread)
    wanted = in_float64(torch.stack([q, k, v]), cache, [90])
    found = attend(q, k, v, keys=cache[0], values=cache[1], past=[90])
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-4 * spread)


@torch.no_grad()
def test_a_sample_depends_on_no_other_and_not_on_threads():
    past = [700, 3, 900, 512]
    qkv, cache = draw(torch.bfloat16, past, 1, 64, heads=12, capacity=1024)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(attend(*qkv, keys=cache[0].clone(), values=cache[1].clone(), past=past))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    keys, values = (stored[1:2].clone() for stored in cache)
    assert torch.equal(attend(*qkv[:, :, 1:2], keys=keys, values=values, past=past[1:2])[:, 0], found[0][:, 1])
    qkv[:, 0, 1] = torch.nan
    again = attend(*qkv, keys=cache[0], values=cache[1], past=past)
    assert again[:, 1].isnan().all()
    assert torch.equal(again[:, [0, 2, 3]], found[0][:, [0, 2, 3]])


def test_gradients_other_dtypes_and_many_tokens_are_left_to_pytorch():
    (q, *_), cache = draw(torch.float32, [9], 1, 64)
    assert not is_for_rows(q, cache[0])
    with torch.no_grad():
        assert is_for_rows(q, cache[0])
        assert not is_for_rows(q.double(), cache[0].double())
        assert not is_for_rows(q, cache[0].double())
        assert not is_for_rows(q.repeat(MAX_TOKENS + 1, 1, 1, 1), cache[0])
        assert not is_for_rows(q.to("meta"), cache[0].to("meta"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_a_cache_that_grows_equals_causal_attention(dtype):
    """Many tokens at once, by PyTorch, then few; beyond the positions allocated first."""
    torch.manual_seed(0)
    cache, tokens = KeyValueCache(1), [torch.randn(3, length, 2, 2, 16).to(dtype) for length in (20, 1, 120, 3, 1)]
    for qkv in tokens:
        positions = cache.extend(2, qkv.shape[1], device=CPU, dtype=dtype)
        found = cache.layers[0].attend(*qkv, positions=positions)
    assert found.dtype == cache.layers[0].key.dtype == dtype
    q, k, v = torch.cat(tokens, 1).double().permute(0, 2, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)[-1:]
    rest = 1e-3 if dtype == torch.float16 else 1e-6  # PyTorch rounds the weights, too
    assert ((found.double() - wanted).abs() <= 0.51 * torch.finfo(dtype).eps * wanted.abs() + rest).all()
