"""What one layout saves, any other loads, bit for bit; what doesn't fit is refused by name."""

import itertools
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader, load_shards
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import ModelConfig
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support.toy import (
    MODEL,
    all_ranks,
    blank,
    random_tensors,
    rank_shards,
    read_all,
    record,
    same,
    save,
    shapes,
    stage_of,
    target,
)

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 5), (2, 2, 2), (3, 1, 2), (5, 1, 1), (4, 3, 3)]
"""(tensor, stages, replicas); 5 does not divide the rows: the last ranks hold fewer, or none."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_reads_what_any_other_wrote(tmp_path, layout):
    tensors = random_tensors()
    reader = CheckpointReader(save(tmp_path, tensors, layout))
    for other in LAYOUTS:
        for rank in all_ranks(other):
            wanted = rank_shards(tensors, other, rank)
            loaded = blank(wanted)
            for group, shards in loaded.items():
                load_shards(reader, group, shards, expected_names=shapes())
            for have, want in zip(itertools.chain(*loaded.values()), itertools.chain(*wanted.values()), strict=True):
                assert torch.equal(have.tensor, want.tensor), (other, rank, have.name)


def test_layouts_leave_no_trace_in_the_values(tmp_path):
    tensors = random_tensors()
    for number, layout in enumerate(LAYOUTS):
        assert same(read_all(save(tmp_path / str(number), tensors, layout)), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_types_and_bit_patterns_survive(tmp_path, dtype):
    rows = torch.randint(0, 2**60, (5, 3)).view(torch.uint8)[:, : 3 * dtype.itemsize].contiguous().view(dtype)
    path = save_checkpoint(
        tmp_path, 1, tensors={"model": [RowShard("w", (5, 3), 0, 5, rows, True)]}, record=record(1), writer_label="all"
    )
    read = CheckpointReader(path).read_rows("model", "w", start=1, stop=4)
    assert torch.equal(read.view(torch.uint8), rows[1:4].view(torch.uint8))


def test_only_the_rows_asked_for_are_read(tmp_path):
    tensors = random_tensors()
    reader = CheckpointReader(save(tmp_path, tensors, (3, 1, 2)))
    whole = tensors["model"]["layers.1.ffn.key_tokens"]
    for start, stop in [(0, 0), (0, 1), (5, 7), (11, 25), (35, 36), (0, 36)]:
        rows = reader.read_rows("model", "layers.1.ffn.key_tokens", start=start, stop=stop)
        assert torch.equal(rows, whole[start:stop])
        assert rows.untyped_storage().nbytes() == rows.nbytes
    with pytest.raises(CheckpointError, match=r"ffn.key_tokens has 36 rows, \[30, 40\)"):
        reader.read_rows("model", "layers.1.ffn.key_tokens", start=30, stop=40)


def test_facts_come_back(tmp_path):
    save(tmp_path, random_tensors(), step=120)
    reader = CheckpointReader(tmp_path)
    assert (reader.step, reader.record) == (120, record(120))
    assert reader.shape("exp_avg", "embedding.weight") == (24, 6)
    assert reader.dtype("exp_avg", "embedding.weight") == torch.float32
    assert reader.names("model") == list(shapes())
    assert reader.groups() == ["model", "exp_avg", "exp_avg_sq"]


def shard_of(tensors, name, **changes):
    whole = tensors["model"][name]
    return replace(RowShard(name, tuple(whole.shape), 0, len(whole), torch.empty_like(whole), True), **changes)


def test_another_model_is_refused_by_name(tmp_path):
    tensors = random_tensors()
    reader = CheckpointReader(save(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"another model: its 'model' lacks head\.weight"):
        load_shards(reader, "model", [], expected_names=[*shapes(), "head.weight"])
    with pytest.raises(CheckpointError, match=r"'model' also has final_norm.bias and 1 more"):
        load_shards(reader, "model", [], expected_names=list(shapes())[:-2])
    with pytest.raises(CheckpointError, match=r"holds no 'master', only model, exp_avg, exp_avg_sq"):
        load_shards(reader, "master", [], expected_names=shapes())
    wider = shard_of(tensors, "embedding.weight", global_shape=(24, 8))
    with pytest.raises(CheckpointError, match=r"embedding.weight is \[24, 6\] torch.float32 in it, \[24, 8\]"):
        load_shards(reader, "model", [wider], expected_names=shapes())
    half = shard_of(tensors, "embedding.weight", tensor=torch.empty(24, 6, dtype=torch.float16))
    with pytest.raises(CheckpointError, match=r"torch.float16 in the configured model"):
        load_shards(reader, "model", [half], expected_names=shapes())


def test_what_no_rank_or_two_ranks_write_is_refused(tmp_path):
    rows = torch.ones(4, 2)
    for name, shards in {
        "a": [RowShard("w", (6, 2), 0, 4, rows, True)],
        "b": [RowShard("w", (6, 2), 0, 4, rows, True), RowShard("w", (6, 2), 2, 6, rows, True)],
    }.items():
        with pytest.raises(CheckpointError, match=r"model w: (pieces end at row 4 of 6|expected a piece from row 4)"):
            save_checkpoint(tmp_path / name, 1, tensors={"model": shards}, record=record(1), writer_label="all")
        assert list((tmp_path / name).iterdir()) == []


def test_rows_of_other_writers_are_left_out(tmp_path):
    rows = torch.ones(4, 2)
    shards = [RowShard("w", (4, 2), 0, 4, rows, True), RowShard("w", (4, 2), 0, 4, 2 * rows, False)]
    path = save_checkpoint(tmp_path, 1, tensors={"model": shards}, record=record(1), writer_label="all")
    assert torch.equal(CheckpointReader(path).read_rows("model", "w", start=0, stop=4), rows)


def test_the_target_helper_is_consistent():
    declared = model_parameters(ModelConfig(**MODEL))
    assert {name: (parameter.shape, target(2, 3).stage_of(parameter)) for name, parameter in declared.items()} == {
        name: (shape, stage_of(name, 3)) for name, shape in shapes().items()
    }
