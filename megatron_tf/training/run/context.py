"""The objects that the parts of a run share over all growth stages."""

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
    """The services of a run: data, checkpoints, stopping, timing and reporting."""

    loader: BatchLoader
    validation: Sequence[ValidationSet]
    saver: BackgroundSaver
    stop_signal: StopSignal
    timer: StepTimer
    observers: Observers
    say: Callable[[str], None]
    """Writes a human-readable line to the log."""
    is_logged: Callable[[int], bool]
    """Returns whether a log line is due after a number of steps; the same on every rank."""
