"""Recovery from failed steps: skip non-finite batches, and rewind to a checkpoint if the loss keeps spiking."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import SpikeHistory
from megatron_tf.config import RunConfig
from megatron_tf.errors import UserError
from megatron_tf.training.observability.observer import Fault
from megatron_tf.training.run.context import RunContext
from megatron_tf.training.run.left_out import count_rewound
from megatron_tf.training.run.resume import RestoredRun
from megatron_tf.training.run.spikes import SpikeDetector
from megatron_tf.training.step.state import TrainState
from megatron_tf.training.step.step import StepResult

_REWINDS_IN_A_ROW = 3


class DivergedError(UserError):
    """Training has diverged; the message says where the last good state is stored."""


@dataclass(frozen=True)
class Recovered:
    """The record of a run after a failed step."""

    record: RunRecord
    failure: str = ""
    """Why the run must end, after this record and the state are saved; empty if it can continue."""


class Recovery:
    """Counts overflows, skipped batches and spikes of a growth stage, and decides how the run continues.

    `run` is the run at the start of the stage; `reload` restores the newest checkpoint into its state.
    """

    def __init__(
        self, config: RunConfig, run: RestoredRun, *, context: RunContext, reload: Callable[[TrainState], RestoredRun]
    ) -> None:
        self.training = config.training
        self.state = run.state
        self.context = context
        self.reload = reload
        self.spikes = SpikeDetector(config.training.loss_spike_sigmas, run.record.details.spikes)
        self.skipped_in_a_row = 0
        self.rewinds_in_a_row = 0

    def history(self) -> SpikeHistory:
        """Return the history to save in a checkpoint, so that a resumed run detects the same spikes."""
        return self.spikes.history()

    def on_saved(self) -> None:
        """Reset the count of rewinds after a save, since the next rewind returns to a new checkpoint."""
        self.rewinds_in_a_row = 0

    def recover(self, result: StepResult, record: RunRecord, *, first: int) -> Recovered | None:
        """Report a failed step and return how the run continues; None if the step needs no recovery.

        `record` already counts the step, or that it was skipped; `first` is the first sample of its batch.
        """
        if result.is_overflow:
            scale = self.state.scaler.scale
            message = f"gradients overflow in fp16, the loss scale is now {scale:g}; {_end_of_batch(record)} is skipped"
            self._report("overflow", record, message, first=first, loss_scale=scale)
            return Recovered(record)
        if result.nonfinite:
            return self._skip(result.nonfinite, record, first=first)
        self.skipped_in_a_row = 0
        if not self.spikes.is_spike(result.loss):
            return None
        cause = f"warning: the loss jumped to {result.loss:.4f}, {self.spikes.in_a_row} consecutive step(s)"
        self._report(
            "spike",
            record,
            f"{cause}; the batch ends at sample {record.training.samples:,}",
            first=first,
            loss=result.loss,
        )
        # not >=: without a checkpoint the count continues, and every later spike would try again
        is_due = self.spikes.in_a_row == self.training.rewind_after_spikes
        return self._rewind(record) if is_due else None

    def _skip(self, nonfinite: Mapping[str, int], record: RunRecord, *, first: int) -> Recovered:
        culprits, skipped = name_nonfinite(nonfinite), record.training.skipped
        message = f"warning: non-finite: {culprits}; {_end_of_batch(record)} is skipped, {skipped} so far"
        self._report("skipped", record, message, first=first, nonfinite=dict(nonfinite))
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.training.max_skipped_steps:
            return Recovered(record)
        return Recovered(record, f"{self.skipped_in_a_row} consecutive batches were non-finite in {culprits}")

    def _rewind(self, record: RunRecord) -> Recovered | None:
        """Return to the last checkpoint, but skip the data read since; None if there is no checkpoint."""
        spent = record.training
        self.context.saver.wait()  # the newest checkpoint may still be being written
        restored = self.reload(self.state)  # in place: a second state may not fit into memory
        for damaged in restored.damaged:
            self.context.say(f"step {spent.step:>6}  warning: {damaged}")
        if restored.origin is None:
            self.context.say(f"step {spent.step:>6}  there is no checkpoint to rewind to: training continues")
            return None
        self.rewinds_in_a_row += 1
        self.spikes.restart()
        # parameters, optimizer state and schedule of the checkpoint, but the current position in the data
        training = replace(
            restored.record.training,
            samples=spent.samples,
            # the data of undone steps counts as skipped
            skipped=spent.skipped + spent.step - restored.record.training.step,
            overflows=spent.overflows,
        )
        # the loader continues in its phase of the data, which the checkpoint may not have known yet
        details = replace(restored.record.details, phase=record.details.phase, phases=record.details.phases)
        rewound = replace(restored.record, training=training, usage=record.usage, details=details)
        rewound = count_rewound(rewound, restored.record)
        message = f"rewound to {restored.origin}; skipping data up to sample {spent.samples:,}"
        self._report("rewind", rewound, message, first=restored.record.training.samples)
        if self.rewinds_in_a_row < _REWINDS_IN_A_ROW:
            return Recovered(rewound)
        return Recovered(rewound, f"the loss jumped again after {_REWINDS_IN_A_ROW} rewinds to the same checkpoint")

    def _report(self, kind: str, record: RunRecord, message: str, *, first: int, **values: Any) -> None:
        values |= {"first_sample": first, "samples": record.training.samples}
        fault = Fault(kind=kind, step=record.training.step, message=message, values=values)
        self.context.observers.tell(lambda observer: observer.on_fault(fault))


def _end_of_batch(record: RunRecord) -> str:
    return f"the batch that ends at sample {record.training.samples:,}"


def name_nonfinite(nonfinite: Mapping[str, int]) -> str:
    """Name what was non-finite, and on which rank, for a line of the log."""
    names = [f"{name} (rank {rank})" for name, rank in list(nonfinite.items())[:3]]
    more = len(nonfinite) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
