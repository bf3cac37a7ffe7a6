"""Which tokens may come and how likely, against the definitions; how random numbers choose among them."""

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.inference.sampling import Sampling, candidates, sample_tokens

LOGITS = torch.tensor([[0.1, 2.0, -1.0, 1.5, 0.3], [3.0, 0.0, 0.0, 2.9, -4.0]])


def distribution(sampling):
    """Probabilities by id [B, V]."""
    ids, probabilities = candidates(LOGITS, sampling)
    return torch.zeros_like(LOGITS).scatter(1, ids, probabilities)


def by_definition(logits, temperature, top_k, top_p):
    """Of one row, id by id."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[:top_k] if top_k else order
    weights = {i: float(torch.exp(torch.tensor(logits[i]).double() / temperature)) for i in kept}
    total, reached, nucleus = sum(weights.values()), 0.0, []
    for i in kept:
        if reached < top_p:
            nucleus.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("top_p", [0.1, 0.55, 0.8, 0.97, 1.0])
def test_probabilities_are_those_of_the_definition(temperature, top_k, top_p):
    found = distribution(Sampling(temperature, top_k, top_p))
    for row, logits in zip(found, LOGITS.tolist(), strict=True):
        assert row.tolist() == pytest.approx(by_definition(logits, temperature, top_k, top_p), abs=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 3), Sampling(1.0, 0, 0.8), Sampling(2.0, 4, 0.9)])
def test_an_even_grid_of_numbers_gives_each_token_its_share(sampling):
    count = 10_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row, wanted in zip(LOGITS, distribution(sampling), strict=True):
        tokens = sample_tokens(row.expand(count, -1), sampling, grid)
        shares = torch.bincount(tokens, minlength=len(row)) / count
        assert torch.allclose(shares, wanted, atol=1.01 / count)
        edges = sample_tokens(row.expand(2, -1), sampling, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
        assert (wanted[edges] > 0).all()


def test_temperature_zero_takes_the_likeliest():
    assert sample_tokens(LOGITS, Sampling(temperature=0), torch.tensor([0.99, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_values_without_a_meaning_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
