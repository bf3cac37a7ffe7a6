"""The generator behind dropout: published numbers, a reference in Python's integers, and how random it looks."""

import math

import pytest
import torch

from megatron_tf.kernels import dropout
from megatron_tf.kernels.dropout import drop, dropped, nth_word
from megatron_tf.layers.dropout import Dropout

BITS = 2**64


def reference_word(seed, index):
    """As Steele, Lea and Flood publish SplitMix64, in unsigned integers of any size."""
    word = (seed + (index + 1) * 0x9E3779B97F4A7C15) % BITS
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % BITS
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % BITS
    return word ^ (word >> 31)


def unsigned(words):
    return [word % BITS for word in words.flatten().tolist()]


def test_words_are_those_that_are_published():
    words = nth_word(torch.tensor(1234567), torch.arange(5))
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert unsigned(words) == [*published, 16408922859458223821]


def test_words_are_those_of_unsigned_integers():
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=torch.Generator().manual_seed(0))
    for index in (0, 1, 2**31, 2**63 - 1):
        expected = [reference_word(seed, index) for seed in unsigned(seeds)]
        assert unsigned(nth_word(seeds, index)) == expected
        assert unsigned(nth_word(seeds, torch.tensor(index))) == expected


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
@pytest.mark.parametrize("cached_words", [1, 1 << 16], ids=["row by row", "all rows"])
def test_masks_are_those_of_unsigned_integers(columns, cached_words, monkeypatch):
    monkeypatch.setattr(dropout, "_CACHED_WORDS", cached_words)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3, 5), generator=torch.Generator().manual_seed(columns))
    rate = 0.3
    expected = []
    for seed in unsigned(seeds):
        halves = [reference_word(seed, column // 2) >> 32 * (column % 2) for column in range(columns)]
        # signed 32 bits below a bound: the upper half of the unsigned ones comes first
        expected.append([(half + 2**31) % 2**32 < round(rate * 2**32) for half in halves])
    assert dropped(seeds, columns, rate).view(15, columns).tolist() == expected


@pytest.mark.parametrize("rate", [2**-32, 1e-4, 0.1, 0.5, 0.999, 1 - 2**-40])
def test_bounds_are_the_rate_of_all_numbers_of_32_bits(rate):
    bound = dropout.threshold(rate)
    assert -(2**31) < bound < 2**31
    assert (bound + 2**31) / 2**32 == pytest.approx(rate, abs=2**-32)


def test_the_backward_drops_what_the_forward_dropped():
    x = torch.randn(4, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    residual, seeds = torch.ones_like(x), torch.arange(12).view(4, 3)
    options = {"stream": 3, "rate": 0.4}
    assert torch.autograd.gradcheck(lambda x, r: drop(x, seeds, residual=r, **options), (x, residual.requires_grad_()))
    kept = (drop(torch.ones_like(x), seeds, **options) != 0).double()
    torch.testing.assert_close(drop(x, seeds, residual=residual, **options), residual + x * kept / 0.6)


def test_what_is_dropped_is_not_multiplied():
    x = torch.tensor([[math.inf, math.nan] * 200])
    out = drop(x, torch.tensor([7]), stream=0, rate=0.5)
    assert set(out[out.isfinite()].tolist()) == {0.0}


def seeds_of(samples, layer=None, seed=1):
    dropout_of = Dropout(hidden_rate=0.5, attention_rate=0.5, seed=seed, layer=layer).of_samples
    positions = torch.arange(256)
    return dropout_of(torch.arange(samples), positions=positions, heads=8, group=None, sequence_parallel=False).seeds


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_shares_are_those_of_independent_coins(kind, rate):
    mask = dropped(getattr(seeds_of(4), kind), 512, rate)
    for dims in ((-1,), (0, 1), tuple(range(mask.dim()))):
        shares = mask.double().mean(dims)
        number = mask.numel() / shares.numel()
        # Bernstein's inequality: of as many binomial shares, one is farther off with probability 1e-6
        log = math.log(2 * shares.numel() / 1e-6)
        bound = math.sqrt(2 * rate * (1 - rate) * log / number) + 2 * log / (3 * number)
        assert float((shares - rate).abs().max()) < bound
    coins = torch.tensor(rate * (1 - rate) / 512)
    assert mask.double().mean(-1).var() == pytest.approx(coins, rel=0.25), "shares of rows vary as those of coins do"


def correlation(a, b, rate=0.5):
    a, b = a.double() - rate, b.double() - rate
    return float((a * b).mean()) / (rate * (1 - rate)) * math.sqrt(a.numel())


def test_neighbors_are_uncorrelated():
    """Correlations, in standard deviations, of columns, positions, samples, heads, words and their halves."""
    hidden = dropped(seeds_of(6).hidden, 256, 0.5)  # [256, 6, 256]
    attention = dropped(seeds_of(2).attention, 256, 0.5)  # [2, 8, 256, 256]
    found = {}
    for lag in (1, 2, 3, 4, 64):
        found |= {f"column {lag}": correlation(hidden[..., lag:], hidden[..., :-lag])}
        found |= {f"position {lag}": correlation(hidden[lag:], hidden[:-lag])}
        found |= {f"query {lag}": correlation(attention[:, :, lag:], attention[:, :, :-lag])}
        found |= {f"diagonal {lag}": correlation(hidden[lag:, :, lag:], hidden[:-lag, :, :-lag])}
    for lag in (1, 2, 4):
        found |= {f"sample {lag}": correlation(hidden[:, lag:], hidden[:, :-lag])}
        found |= {f"head {lag}": correlation(attention[:, lag:], attention[:, :-lag])}
    found |= {"hidden and attention": correlation(hidden.transpose(0, 1)[:2], attention[:, 0])}
    assert max(map(abs, found.values())) < 4.5, found


def test_layers_branches_and_runs_are_uncorrelated():
    x = torch.ones(256, 2, 256)

    def mask(layer, branch, seed=1):
        make = Dropout(hidden_rate=0.5, attention_rate=0.0, seed=seed, layer=layer).of_samples
        dropout = make(torch.tensor([8, 9]), positions=torch.arange(256), heads=1, group=None, sequence_parallel=False)
        return dropout.hidden(x, branch) == 0

    masks = [mask(layer, branch) for layer in (0, 1, 2) for branch in ("attention", "ffn")]
    masks += [mask(None, "embedding"), mask(0, "attention", seed=2), mask(0, "attention", seed=-1)]
    pairs = [(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 4.5


def test_three_elements_are_uncorrelated():
    """As they are not in a linear generator, where two elements determine a third one."""
    signs = dropped(seeds_of(4).hidden, 512, 0.5).double() * 2 - 1
    for first, second in ((1, 2), (2, 4), (1, 3), (2, 6)):
        product = signs[..., second:] * signs[..., first : first - second] * signs[..., :-second]
        assert abs(float(product.mean())) * math.sqrt(product.numel()) < 4.5
    product = signs[2:] * signs[1:-1] * signs[:-2]
    assert abs(float(product.mean())) * math.sqrt(product.numel()) < 4.5
