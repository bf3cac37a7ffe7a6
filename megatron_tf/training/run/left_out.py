"""Counts the tokens that the model does not see, by training set, and reports them; under `data.order: lanes` only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import TrainingConfig
from megatron_tf.data.phases import Phase
from megatron_tf.training.observability.observer import DataReport, Observers


def phase_of(record: RunRecord) -> Phase | None:
    """Return the phase of the data that a run is in; None under another order than lanes."""
    return None if record.details.phase is None else Phase.from_json(record.details.phase)


def count_skipped(record: RunRecord, first: int) -> RunRecord:
    """Return the record with the samples from `first` to its position counted as skipped."""
    phase = phase_of(record)
    return record if phase is None else _with(record, phase.after_skip(first, record.training.samples))


def count_rewound(record: RunRecord, saved: RunRecord) -> RunRecord:
    """Return the record, whose model is that of the checkpoint `saved`, with all samples since then counted as skipped
    or rewound."""
    phase, restored = phase_of(record), phase_of(saved)
    if phase is None or restored is None:
        return record
    counted = phase.after_rewind(record.training.samples, saved=restored, sample=saved.training.samples)
    return _with(record, counted)


def _with(record: RunRecord, phase: Phase) -> RunRecord:
    return replace(record, details=replace(record.details, phase=phase.to_json()))


class EpochWatch:
    """Notices when a training set starts its next epoch."""

    def __init__(self, record: RunRecord) -> None:
        self._phase = phase_of(record)
        self._epochs = self._epochs_at(record.training.samples)

    def started(self, samples: int) -> list[str]:
        """Return the sets that have started an epoch since the last call, when this many samples have been read."""
        earlier, self._epochs = self._epochs, self._epochs_at(samples)
        return [name for name, epoch in self._epochs.items() if epoch != earlier[name]]

    def _epochs_at(self, samples: int) -> dict[str, int]:
        if self._phase is None:
            return {}
        return {name: state.position.epoch for name, state in self._phase.states_at(samples).items()}


def report_data(
    observers: Observers,
    record: RunRecord,
    training: TrainingConfig,
    *,
    reason: Literal["phase", "epoch", "end"],
    new_epochs: Sequence[str] = (),
) -> None:
    """Tell the observers what has been read and left out of each training set."""
    phase, done = phase_of(record), record.training
    if phase is None:
        return
    report = DataReport(
        reason=reason, step=done.step, samples=done.samples, phase=phase, training=training, new_epochs=new_epochs
    )
    observers.tell(lambda observer: observer.on_data(report))
