"""The section `training`: batch sizes, length of the run, precision, evaluation and recovery."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Count, NonNegative, Number, Seed


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainingConfig:
    """Batch sizes, length of the run, precision, evaluation and recovery."""

    seq_length: Count
    """Sequence length in tokens."""
    micro_batch_size: Count
    """Number of samples in a micro-batch of one data-parallel rank."""
    global_batch_size: Count
    """Number of samples in one optimizer step, over all data-parallel ranks."""
    rampup_batch_size: tuple[Count, Count, Count] | None = None
    """[START, INCREMENT, SAMPLES]: ramp the batch size from START to global_batch_size in increments of INCREMENT,
    evenly over the first SAMPLES samples of the run."""
    train_iters: Count
    """Total number of optimizer steps of the run, including those before a resume."""
    seed: Seed = 1234
    """Random seed of the initial values, the order of the data and dropout."""
    deterministic: bool = False
    """Use only deterministic algorithms, which are bitwise reproducible on the same layout and machine; raise an error
    for an operation that has none."""
    precision: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Data type of activations and matrix products; parameters, gradient accumulation and Adam stay in fp32. fp8 is
    bf16 with each Pattention's products in fp8. Under fp64 everything is in fp64, for proofs and studies."""
    fp8_scaling: Literal["tensorwise", "rowwise"] = "rowwise"
    """Under precision fp8, what has its own scale: a whole matrix, which is fastest, or each row of it."""
    max_skipped_steps: Count = 5
    """Abort after this many consecutive batches with a non-finite loss or gradient; the last good state is saved
    first."""
    loss_spike_sigmas: Annotated[Number, Field(gt=0)] = 8.0
    """Report a loss as a spike if it exceeds the recent mean by this many standard deviations."""
    rewind_after_spikes: Count | None = None
    """After this many consecutive spikes, rewind to the last checkpoint and skip the data read since; by default
    spikes are only reported."""
    exit_duration_in_mins: Annotated[Number, Field(gt=0)] | None = None
    """Save and exit with code 75 (resubmit the job) at the first step after this many minutes."""
    hidden_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the outputs of the embedding, of each attention and of each feed-forward."""
    attention_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of the attention weights between tokens; needs kernels.attention sdpa."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: none, selective (recompute the scores of each Pattention in the backward pass) or full
    (recompute each transformer block)."""
    eval_interval: NonNegative = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_iters: Count = 10
    """Number of global batches in one evaluation."""
    eval_after_growth: list[NonNegative] = Field(default_factory=list)
    """Also evaluate this many steps after each growth, 0 meaning right after it, and right before each growth of the
    run; needs eval_interval."""

    def batch_size_at(self, consumed_samples: int) -> int:
        """Return the global batch size of the step that starts after `consumed_samples`, ramped as in Megatron-LM."""
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        # integer arithmetic only, so that every rank and every resume computes the same size
        increments = (self.global_batch_size - start) // increment
        return start + increment * min(increments, consumed_samples * increments // samples)

    def samples_of(self, steps: int) -> int:
        """Return the total number of samples in the first `steps` steps."""
        samples = 0
        ramp = self.rampup_batch_size[2] if self.rampup_batch_size else 0
        for step in range(steps):
            # after the ramp all steps have the same size: no need to count them one by one
            if samples >= ramp:
                return samples + (steps - step) * self.global_batch_size
            samples += self.batch_size_at(samples)
        return samples

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Every global batch size that a step of the run can have, in increasing order."""
        start, increment, _ = self.rampup_batch_size or (self.global_batch_size, 1, 0)
        return range(start, self.global_batch_size + 1, increment)

    def __post_init__(self) -> None:
        if self.eval_after_growth and not self.eval_interval:
            raise ConfigError("eval_after_growth needs eval_interval: set it, for example to train_iters")
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            if start >= self.global_batch_size or (self.global_batch_size - start) % increment:
                raise ConfigError(
                    f"rampup_batch_size cannot go from {start} by {increment} at a time to global_batch_size "
                    f"({self.global_batch_size}): START must be smaller, and the difference divisible by INCREMENT"
                )
        for size in self.batch_sizes:
            if size % self.micro_batch_size:
                key = "global_batch_size" if size == self.global_batch_size else "a batch of rampup_batch_size"
                raise ConfigError(f"{key} ({size}) must be divisible by micro_batch_size ({self.micro_batch_size})")
