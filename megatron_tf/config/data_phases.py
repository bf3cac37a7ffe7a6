"""Phases of the training data, as they are configured; `data/phases.py` is what a run makes of them."""

import dataclasses
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.moment import Moment
from megatron_tf.config.training import TrainingConfig
from megatron_tf.config.types import STRICT, Count, Prefix


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataPhase(Moment):
    """A change of the training data during the run; what a phase does not name stays as it was."""

    data_path: Annotated[list[Prefix], Field(min_length=1)] | None = None
    """New datasets or weights. A set that is not named keeps its position, and continues there in a later phase."""
    seq_length: Count | None = None
    """New sequence length in tokens."""
    micro_batch_size: Count | None = None
    """New number of samples in a micro-batch of one data-parallel rank."""
    global_batch_size: Count | None = None
    """New number of samples in one optimizer step; ends a ramp-up of the batch size."""

    def __post_init__(self) -> None:
        if self.data_path is None and not self._sizes():
            raise ConfigError("changes nothing: give data_path, seq_length, micro_batch_size or global_batch_size")

    def training_after(self, training: TrainingConfig) -> TrainingConfig:
        """Return the section `training` from this phase on. Raises ValidationError if the sizes do not fit together."""
        changes: dict[str, Any] = self._sizes()
        if self.global_batch_size is not None:
            changes["rampup_batch_size"] = None
        return dataclasses.replace(training, **changes)

    def _sizes(self) -> dict[str, int]:
        """Return the new sizes by their key of the section `training`."""
        keys = ("seq_length", "micro_batch_size", "global_batch_size")
        return {key: size for key in keys if (size := getattr(self, key)) is not None}
