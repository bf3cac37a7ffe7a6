"""Parts of a run's record: counters, usage, loss scale, and what resuming needs. `record` says how they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron_tf.checkpoint.json_object import JsonObject

MOST_STEPS = 10**15
"""Upper bound on steps, which become directory names; no real run reaches it."""

Identity = Mapping[str, Any]
"""Identifies a tokenizer or a training set; created in `data` and `training`, and compared as a whole."""


@dataclass(frozen=True)
class TrainingCounters:
    """Progress of a run."""

    step: int
    """Completed optimizer steps."""
    samples: int
    """Samples read over all data-parallel ranks, which is the position in the data."""
    tokens: int
    """Tokens trained on."""
    adam_steps: int
    """Step count used by Adam's bias correction."""
    skipped: int
    """Batches that were read but did not affect the model: those with a non-finite loss or gradient, and those of steps
    that a rewind discarded."""
    overflows: int = 0
    """Batches that were read but skipped because their gradients overflowed at the current loss scale."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `training`."""
        return cls(
            step=values.count("step", most=MOST_STEPS),
            samples=values.count("samples"),
            tokens=values.count("tokens"),
            adam_steps=values.count("adam_steps"),
            skipped=values.count("skipped"),
            overflows=values.count("overflows", 0),
        )


START = TrainingCounters(step=0, samples=0, tokens=0, adam_steps=0, skipped=0)
"""Counters of a model that has not been trained by this program."""


@dataclass(frozen=True)
class Usage:
    """Compute used by a run, over all its jobs, ranks and growth stages."""

    flops: float = 0.0
    """Floating-point operations of the model in all steps."""
    device_seconds: float = 0.0
    """Seconds of device time, summed over devices."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `usage`."""
        return cls(values.number("flops", 0.0), values.number("device_seconds", 0.0))


@dataclass(frozen=True)
class SpikeHistory:
    """State of the loss-spike detector when the run was saved."""

    losses: tuple[float, ...]
    """The most recent losses that were not spikes, oldest first."""
    in_a_row: int
    """Consecutive spikes up to the last step."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `run.spikes`."""
        return cls(tuple(values.number_items("losses")), values.count("in_a_row"))


@dataclass(frozen=True)
class RunDetails:
    """Additional state needed to resume a run as if it had never stopped; missing from checkpoints of version 0.1."""

    data: tuple[Identity, ...] | None = None
    """Identity of each training dataset; None if unknown."""
    spikes: SpikeHistory | None = None
    """State of the spike detector; None if it has not seen a loss."""
    evaluation_due: bool = False
    """Whether the run was stopped before the evaluation that is due after this step."""
    blend: str | None = None
    """Name of the order in which datasets are blended under data.order counter; fixed for the whole run."""
    dropout: str | None = None
    """Name of the generator of dropout masks; None if they were drawn by torch's generators."""
    phase: Mapping[str, Any] | None = None
    """Phase of the data under data.order lanes; created in `data`. None under another order."""
    phases: int = 0
    """Number of phases of the run's `data.phases` that are done."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `run`."""
        has_data = values.has("data")
        return cls(
            data=tuple(identity.values for identity in values.sections("data")) if has_data else None,
            spikes=values.optional("spikes", SpikeHistory.from_json, None),
            evaluation_due=values.boolean("evaluation_due", False),
            blend=values.text("blend") if values.has("blend") else None,
            dropout=values.text("dropout") if values.has("dropout") else None,
            phase=values.section("phase").values if values.has("phase") else None,
            phases=values.count("phases", 0),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the value of the key `run`."""
        spikes = self.spikes
        phase = {} if self.phase is None else {"phase": dict(self.phase), "phases": self.phases}
        return {
            "data": None if self.data is None else [dict(identity) for identity in self.data],
            "spikes": None if spikes is None else {"losses": list(spikes.losses), "in_a_row": spikes.in_a_row},
            "evaluation_due": self.evaluation_due,
            "blend": self.blend,
            "dropout": self.dropout,
            **phase,
        }


@dataclass(frozen=True)
class LossScale:
    """State of the dynamic loss scale of fp16."""

    scale: float
    growth_tracker: int
    """Steps since the scale changed or gradients overflowed."""
    hysteresis_tracker: int
    """Remaining overflows before the scale is halved; negative after further ones."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `loss_scale`."""
        return cls(values.number("scale"), values.whole("growth_tracker"), values.whole("hysteresis_tracker"))
