"""How the model and the batch of a run are distributed over ranks."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Count

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]

ContextParallelMethod = Literal["ring", "all_to_all"]

_STAGES_PER_RANK: dict[PipelineSchedule, int] = {"gpipe": 1, "1f1b": 1, "zbv": 2, "dualpipev": 2}
"""Stages that a schedule runs on each rank, for the schedules that leave no choice."""
_SPLIT_BACKWARD: tuple[PipelineSchedule, ...] = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of a stage's parameters later than that of its input."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ParallelConfig:
    """How the model and the batch are distributed over ranks."""

    tensor_model_parallel_size: Count = 1
    """Number of ranks that each layer's parameter tokens are split over."""
    pipeline_model_parallel_size: Count = 1
    """Number of pipeline ranks that the layers are split over."""
    num_virtual_stages_per_pipeline_rank: Count | None = None
    """Number of stages on each pipeline rank: 1 for gpipe and 1f1b, 2 for zbv and dualpipev, and by default 2 for the
    interleaved schedules. A single pipeline rank runs the whole model as one stage."""
    pipeline_model_parallel_layout: Annotated[list[Count], Field(min_length=1)] | None = None
    """Number of layers of each pipeline stage, in order, such as [3, 4, 4, 3]; by default balanced by FLOPs."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """Order in which the pipeline ranks run forward and backward micro-batches."""
    data_parallel_size: Count | None = None
    """Number of data-parallel ranks that split the batch; by default the world size divided by the other sizes."""
    data_parallel_shard_size: Count | None = None
    """Number of data-parallel ranks that parameters, gradients and optimizer state are sharded over. By default all of
    them (fully sharded); 1 replicates them on every rank; a size in between shards within groups of that many ranks
    and replicates across groups (hybrid sharding). The context-parallel ranks of each share them in any case."""
    reshard_after_forward: bool = False
    """Free the gathered parameters of each layer after its forward and its backward (ZeRO-3), and reduce its gradients
    in every micro-batch: less memory, more communication. By default both are done once per step."""
    context_parallel_size: Count = 1
    """Number of ranks that each sequence is split over, for long sequences. They hold the same parameters and exchange
    what attention needs."""
    context_parallel_method: ContextParallelMethod = "ring"
    """How attention sees the whole sequence. ring: keys and values pass from rank to rank while attention to those at
    hand is computed; each rank has two chunks of the sequence, one from each end, so that all have the same work.
    all_to_all: ranks exchange tokens for heads before attention and back after it, for which the heads of a
    tensor-parallel rank must be divisible by context_parallel_size. Megatron-LM calls them p2p and a2a."""
    sequence_parallel: bool = False
    """Shard the activations between layers along the sequence over the tensor-parallel ranks."""
    tp_comm_overlap_chunks: Count = 1
    """Number of chunks of the tokens that a Pattention's activations travel in between tensor-parallel ranks, each
    while the products of others run. For devices that compute while they send; with 1, products wait for them. The
    result is the same but for rounding."""
    distributed_timeout_seconds: Annotated[Count, Field(le=10**8)] = 600
    """Timeout after which a rank that waits for another one fails with an error."""

    @property
    def num_chunks(self) -> int:
        """Return the number of equal chunks that context-parallel ranks cut a sequence into."""
        size = self.context_parallel_size
        return 2 * size if size > 1 and self.context_parallel_method == "ring" else size

    @property
    def stages_per_rank(self) -> int:
        """Return the number of stages on each pipeline rank."""
        if self.pipeline_model_parallel_size == 1:
            return 1
        return _STAGES_PER_RANK.get(self.pipeline_schedule) or self.num_virtual_stages_per_pipeline_rank or 2

    @property
    def num_stages(self) -> int:
        """Return the number of stages of the whole pipeline."""
        return self.pipeline_model_parallel_size * self.stages_per_rank

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel needs tensor_model_parallel_size > 1; set it to false")
        if self.tp_comm_overlap_chunks > 1 and self.tensor_model_parallel_size == 1:
            raise ConfigError("tp_comm_overlap_chunks needs tensor_model_parallel_size > 1; set it to 1")
        fixed = _STAGES_PER_RANK.get(self.pipeline_schedule)
        virtual = self.num_virtual_stages_per_pipeline_rank
        if fixed is not None and virtual not in (None, fixed):
            raise ConfigError(
                f"num_virtual_stages_per_pipeline_rank is {virtual}, but pipeline_schedule {self.pipeline_schedule} "
                f"runs {fixed} on each rank: remove the key, or choose interleaved_1f1b or interleaved_zero_bubble"
            )
        if self.reshard_after_forward and self.pipeline_schedule in _SPLIT_BACKWARD:
            raise ConfigError(
                f"reshard_after_forward reduces gradients with each backward, but pipeline_schedule "
                f"{self.pipeline_schedule} computes those of parameters later: choose 1f1b or interleaved_1f1b"
            )
        layout = self.pipeline_model_parallel_layout
        if layout is not None and len(layout) != self.num_stages:
            raise ConfigError(
                f"pipeline_model_parallel_layout gives the layers of {len(layout)} stage(s), but there are "
                f"{self.num_stages}: {self.stages_per_rank} on each of {self.pipeline_model_parallel_size} rank(s)"
            )
