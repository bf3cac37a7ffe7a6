"""What the parts of a run share, whatever its stage of growth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.data.build import ValidationSet
from megatron_tf.data.loader import BatchLoader
from megatron_tf.training.observability.observer import Observers
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.supervision.stop_signal import StopSignal


@dataclass(frozen=True)
class RunContext:
    """What a run works with."""

    loader: BatchLoader
    validation: Sequence[ValidationSet]
    saver: BackgroundSaver
    stop_signal: StopSignal
    timer: StepTimer
    observers: Observers
    say: Callable[[str], None]
    """Takes a line for people."""
