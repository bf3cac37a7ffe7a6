"""The training data of a run under `data.order: lanes`: its sets, and the phase of the run that says what is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tf.config import ConfigError
from megatron_tf.data.lane_set import LaneSet
from megatron_tf.data.phases import Phase
from megatron_tf.data.sample import Sample


class LaneSamples:
    """The samples of a phase; sample numbers are those of the run, from the phase's first one on."""

    def __init__(self, phase: Phase, sets: Mapping[str, LaneSet]) -> None:
        self.phase = phase
        self.sets = sets
        self.has_loss_mask = any(part.mask is not None for part in sets.values())

    def __getitem__(self, sample: int) -> NDArray[np.integer]:
        reading = self.phase.locate(sample)
        return self.sets[reading.name].ids(reading)

    def read(self, sample: int) -> Sample:
        """Return the ids of a sample, with its loss mask if its set has one."""
        reading = self.phase.locate(sample)
        return self.sets[reading.name].read(reading)

    def prefetch(self, sample: int) -> None:
        """Ask the operating system to read a sample ahead, without waiting for it."""
        reading = self.phase.locate(sample)
        self.sets[reading.name].prefetch(reading)

    def place(self, sample: int, position: int) -> tuple[Path, int, int]:
        """Return the source of the token at `position` of a sample: (dataset, document, offset in the document)."""
        reading = self.phase.locate(sample)
        return self.sets[reading.name].place(reading, position)


def lane_samples(
    sets: Sequence[LaneSet],
    weights: Sequence[float],
    *,
    seq_length: int,
    sample: int,
    saved: Mapping[str, Any] | None,
) -> LaneSamples:
    """Return the samples of a run from `sample` on, continuing the phase `saved` in its checkpoint, if any.

    Opens a new phase if the saved one has another sequence length, other sets or weights, or another order of a set.
    Raises ConfigError if two sets have the same name, by which a checkpoint knows them, and DataError for a set that is
    too small.
    """
    by_name: dict[str, LaneSet] = {}
    for part in sets:
        name = part.dataset.prefix.name
        if name in by_name:
            raise ConfigError(
                f"data.data_path: two datasets are called {name}, but data.order lanes knows them by name: rename the "
                f"files of one, or set data.order: counter"
            )
        by_name[name] = part
    rings = {name: part.ring for name, part in by_name.items()}
    shares = dict(zip(by_name, weights, strict=True))
    if saved is None:
        phase = Phase.start(seq_length=seq_length, weights=shares, rings=rings, first=sample)
    else:
        phase = Phase.from_json(saved)
        if not phase.is_of(seq_length=seq_length, weights=shares, rings=rings):
            phase = phase.change(sample, seq_length=seq_length, weights=shares, rings=rings)
    phase.check()
    return LaneSamples(phase, by_name)
