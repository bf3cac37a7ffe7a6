"""Where a run's learning-rate schedule counts from, as part of its record."""

from dataclasses import dataclass
from typing import Self

from megatron_tf.checkpoint.json_object import JsonObject


@dataclass(frozen=True)
class ScheduleStart:
    """Where the learning-rate schedule in force starts to count."""

    step: int = 0
    """Optimizer steps of the run before it."""
    tokens: int = 0
    """Tokens trained on before it."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `schedule_start`."""
        return cls(step=values.count("step"), tokens=values.count("tokens"))
