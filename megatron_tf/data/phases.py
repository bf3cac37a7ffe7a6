"""Phases of a run's data: a phase is a stretch of samples with the same sets, weights and sequence length.

A run's position is the number of samples it has read, over all phases. Within a phase, a `SpacedBlend` that starts with
it decides from which set each sample comes, and the set's `LaneOrder` which of its tokens. A change ends a phase and
starts the next one at the positions that all sets have then, including those that are not read for now. The record of
the current phase is all that a checkpoint needs: nothing depends on batch sizes, ranks or where a job was stopped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

from megatron_tf.data.blend import SpacedBlend
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.lanes import START, LaneOrder, LanePosition, Span


class Ring(NamedTuple):
    """The tokens of an epoch of a set, in an order that differs from epoch to epoch."""

    tokens: int
    key: str = ""
    """Hash of what decides the order: the lengths of its documents, the split and the seed."""


@dataclass(frozen=True)
class SetState:
    """A set at the start of a phase."""

    ring: Ring
    position: LanePosition = START
    read: int = 0
    """Targets of all its samples so far, in all epochs."""
    skipped: int = 0
    """Those of batches that were skipped."""
    rewound: int = 0
    """Those of steps that a rewind took back."""

    def continued(self, ring: Ring) -> Self:
        """Return the state of a set whose epochs are now `ring`: if they differ, it starts its next epoch with them."""
        if ring == self.ring:
            return self
        return replace(self, ring=ring, position=self.position.next_epoch(self.ring.tokens))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        counts = (int(values[key]) for key in _COUNTS)
        return cls(Ring(int(values["tokens"]), str(values["key"])), LanePosition.from_json(values), *counts)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values, smaller than 1 KB."""
        counts = {key: getattr(self, key) for key in _COUNTS}
        return {**self.ring._asdict(), **self.position.to_json(), **counts}


_COUNTS = ("read", "skipped", "rewound")


class Reading(NamedTuple):
    """Where the targets of a sample are."""

    name: str
    """The set."""
    epoch: int
    spans: list[Span]
    """Targets of the epoch's ring of tokens, in the order in which the sample has them."""


@dataclass(frozen=True)
class Phase:
    """The data of a run from its sample `first` on."""

    first: int
    seq_length: int
    weights: Mapping[str, float]
    """Weights of the sets that are read, by name; ties between sets go to the earlier one."""
    sets: Mapping[str, SetState]
    """Every set that the run has read or reads, by name."""

    @classmethod
    def start(cls, *, seq_length: int, weights: Mapping[str, float], rings: Mapping[str, Ring], first: int = 0) -> Self:
        """Return a phase in which no set has been read before."""
        sets = {name: SetState(rings[name]) for name in weights}
        return cls(first=first, seq_length=seq_length, weights=weights, sets=sets)

    def check(self) -> None:
        """Raise DataError if a set is too small for a sample, or if its sequence length changed too often."""
        _ = self._orders

    def locate(self, sample: int) -> Reading:
        """Return where a sample of the run is read, for samples from `first` on. Raises DataError for earlier ones."""
        if sample < self.first:
            raise DataError(
                f"sample {sample:,} was read in an earlier phase of the data: this one starts at {self.first:,}"
            )
        which, number = self._blend.locate(sample - self.first)
        name = self._names[which]
        return Reading(name, *self._orders[name].locate(number))

    def states_at(self, sample: int) -> dict[str, SetState]:
        """Return the state of every set when all samples before this one have been read."""
        states = dict(self.sets)
        for name, samples in zip(self._names, self._blend.counts(sample - self.first).tolist(), strict=True):
            state = states[name]
            read = state.read + samples * self.seq_length
            states[name] = replace(state, position=self._orders[name].after(samples), read=read)
        return states

    def after_skip(self, first: int, stop: int) -> Self:
        """Return this phase with the samples [first, stop) counted as skipped."""
        before, after = self.states_at(first), self.states_at(stop)
        return replace(
            self,
            sets={
                name: replace(state, skipped=state.skipped + after[name].read - before[name].read)
                for name, state in self.sets.items()
            },
        )

    def after_rewind(self, stop: int, *, saved: Self, sample: int) -> Self:
        """Return this phase with all samples before `stop` that the model has not seen counted as skipped or rewound.

        The model is that of a checkpoint at `sample`, in the phase `saved`.
        """
        before, after = saved.states_at(sample), self.states_at(stop)
        sets = {}
        for name, state in self.sets.items():
            old = before.get(name, SetState(state.ring))
            rewound = old.rewound + after[name].read - old.read - (state.skipped - old.skipped)
            sets[name] = replace(state, rewound=rewound)
        return replace(self, sets=sets)

    def change(self, sample: int, *, seq_length: int, weights: Mapping[str, float], rings: Mapping[str, Ring]) -> Self:
        """Return the phase that starts at a sample with another length, or other sets, weights or rings.

        A set that was read before is resumed where it was left, or at its next epoch if its ring is another one.
        """
        states = self.states_at(sample)
        for name in weights:
            states[name] = states.get(name, SetState(rings[name])).continued(rings[name])
        return type(self)(first=sample, seq_length=seq_length, weights=weights, sets=states)

    def is_of(self, *, seq_length: int, weights: Mapping[str, float], rings: Mapping[str, Ring]) -> bool:
        """Return whether this phase reads just that."""
        is_same = self.seq_length == seq_length and [*self.weights.items()] == [*weights.items()]
        return is_same and all(self.sets[name].ring == rings[name] for name in weights)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        return cls(
            first=int(values["first"]),
            seq_length=int(values["seq_length"]),
            weights={name: float(weight) for name, weight in values["weights"].items()},
            sets={name: SetState.from_json(state) for name, state in values["sets"].items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the phase as JSON values, smaller than 1 KB for each set."""
        return {
            "first": self.first,
            "seq_length": self.seq_length,
            "weights": dict(self.weights),
            "sets": {name: state.to_json() for name, state in self.sets.items()},
        }

    @cached_property
    def _names(self) -> list[str]:
        return [*self.weights]

    @cached_property
    def _blend(self) -> SpacedBlend:
        return SpacedBlend([*self.weights.values()])

    @cached_property
    def _orders(self) -> dict[str, LaneOrder]:
        return {
            name: LaneOrder(
                self.sets[name].ring.tokens, seq_length=self.seq_length, name=name, start=self.sets[name].position
            )
            for name in self.weights
        }
