"""Plans the checkpoint of a run: the files that every rank would write, and the manifest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron_tf.checkpoint.commit import metadata_and_manifest
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.save import plan_rank
from megatron_tf.checkpoint.shard_files import Written
from megatron_tf.model.parallelize import parameters_of
from megatron_tf.parallel.sharding import Place, RowShard, held_rows
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.run.checkpointing import writer_label
from megatron_tf.training.step.optimizer import MOMENTS
from megatron_tf.training.step.state import TrainState


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint that has not been written."""

    files: Mapping[str, int]
    """Name of each file of tensors -> its bytes."""
    manifest_bytes: int
    metadata_bytes: int
    """Without the identities of the tokenizer and the data, which a dry run does not read."""
    pieces: int
    """Row ranges that the manifest lists."""

    @property
    def bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(self.files.values()) + self.manifest_bytes + self.metadata_bytes


@dataclass(frozen=True)
class Placement:
    """A rank of a pipeline stage, and the rows that it holds."""

    tensor: int
    data: int
    """Rank among data- and context-parallel ranks together."""
    shards: Sequence[RowShard]
    """The rows of each parameter, on the meta device."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Return the number of rows of each parameter: ranks of a stage that agree in them compute alike."""
        return tuple(shard.stop - shard.start for shard in self.shards)


def placements(state: TrainState) -> Iterator[Placement]:
    """Yield the rows of every rank of a stage, given the state of its first rank."""
    mesh, declared = state.mesh, model_parameters(state.stages[0].config)
    assert mesh.rank("tp") == mesh.rank("dp_cp") == 0, "only the first rank knows which rows belong to another stage"
    shard_size = 1 if mesh.sharing is None else mesh.sharing.size(mesh.sharing.ndim - 1)
    for tensor in range(mesh.size("tp")):
        for data in range(mesh.size("dp_cp")):
            replica = dict.fromkeys(("dp", "dp_cp", "dp_shard", "dp_shard_cp"), data % shard_size)
            place = Place(tensor, mesh.size("tp"), replica | {"dp_replicate": data // shard_size})
            shards = [
                _rows_at(shard, parameter, is_sharded=declared[shard.name].is_sharded, place=place)
                for shard, parameter in zip(state.shards, parameters_of(state.stages), strict=True)
            ]
            yield Placement(tensor, data, shards)


def plan_stage(pipeline: int, ranks: Sequence[Placement]) -> list[Written]:
    """Return what each rank of a stage would write."""
    written = []
    for rank in ranks:
        label = writer_label(pipeline=pipeline, tensor=rank.tensor, data=rank.data)
        written.append(plan_rank(dict.fromkeys(("model", *MOMENTS), rank.shards), label))
    return written


def plan_checkpoint(record: RunRecord, written: Sequence[Written]) -> CheckpointPlan:
    """Plan the checkpoint that consists of what all ranks would write."""
    metadata, manifest = metadata_and_manifest(record, written)
    files = {name: entry.bytes for part in written for name, entry in part.files.items()}
    pieces = sum(len(part.pieces) for part in written)
    return CheckpointPlan(
        files=files, manifest_bytes=len(manifest.encode()), metadata_bytes=len(metadata.encode()), pieces=pieces
    )


def _rows_at(shard: RowShard, parameter: nn.Parameter, *, is_sharded: bool, place: Place) -> RowShard:
    """Return the rows that the rank at `place` holds, given those of the first rank of the stage."""
    count = shard.global_shape[0]
    start, stop, is_first_copy = held_rows(parameter, count, is_sharded=is_sharded, place=place)
    rows = torch.empty((stop - start, *shard.global_shape[1:]), dtype=shard.tensor.dtype, device="meta")
    return replace(shard, start=start, stop=stop, tensor=rows, is_writer=shard.is_writer and is_first_copy)
