"""Rotated rows: orthogonal, the same in any blocks, and each from many rows."""

import pytest
import torch

from megatron_tf.checkpoint.rotation import blocks, rotated
from megatron_tf.checkpoint.transformed import Rotated
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from tests.support.grown_models import random_checkpoint, tokenformer

NAME = "layers.1.ffn.key_tokens"


@pytest.mark.parametrize("count", [1, 2, 3, 43, 128, 129, 300, 768])
def test_blocks_are_powers_of_two_that_cover_all_rows(count):
    found = list(blocks(count))
    assert [row for block in found for row in block] == list(range(count))
    assert all(len(block).bit_count() == 1 and len(block) <= 128 for block in found)


@pytest.mark.parametrize("count", [1, 2, 8, 128])
def test_a_block_is_multiplied_by_an_orthogonal_matrix_of_equal_entries(count):
    signs = torch.where(torch.randn(count, generator=torch.Generator().manual_seed(1)) < 0, -1.0, 1.0)
    matrix = rotated(torch.eye(count), signs)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(count).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        matrix.abs(), torch.full((count, count), count**-0.5, dtype=torch.float64), rtol=0, atol=1e-14
    )
    assert torch.equal(matrix[0].sign(), signs.double())  # the first row of a Hadamard matrix is all ones


def test_any_rows_are_those_of_the_whole():
    model = tokenformer(ffn_tokens=300)
    source = random_checkpoint(model)
    segment = Rotated(NAME, 300, "stream", seed=5)
    whole = torch.empty(300, model.hidden_size, dtype=torch.float64)
    segment.read(source, "model", low=0, high=300, out=whole)
    for low, high in [(0, 1), (100, 200), (127, 129), (255, 300), (299, 300)]:
        part = torch.empty(high - low, model.hidden_size, dtype=torch.float64)
        segment.read(source, "model", low=low, high=high, out=part)
        assert torch.equal(part, whole[low:high])
    old = source.read_rows("model", NAME, start=0, stop=300)
    torch.testing.assert_close(whole.t() @ whole, old.t() @ old)
    assert (whole - old).norm(dim=1).min() > 0.01


def test_copies_differ_and_their_values_are_zero():
    grown = grow(random_checkpoint(tokenformer()), GrowthStage(ffn_tokens=4 * 32, init="rotated_key"))
    keys = grown.read_rows("model", NAME, start=0, stop=128).unflatten(0, (4, 32))
    values = grown.read_rows("model", NAME.replace("key", "value"), start=0, stop=128)
    assert all((keys[i] - keys[j]).norm() > 0.5 * keys[0].norm() for i in range(4) for j in range(i))
    assert values[:32].any(dim=1).all()
    assert not values[32:].any()
    for group in ("exp_avg", "exp_avg_sq"):
        assert not grown.read_rows(group, NAME, start=32, stop=128).any()
