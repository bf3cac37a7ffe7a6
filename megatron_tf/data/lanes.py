"""The order `lanes`: every token of an epoch is read exactly once, in contiguous text, at any sequence lengths.

An epoch of a set is a ring of its N tokens: its documents in a random order, end to end. Each token is the target of
one position of one sample. A sample of `seq_length` targets starts with the token before its first target as an input.

**Lanes.** A `Cut` divides a stream of targets into samples, and consecutive samples into about as many lanes as each
lane has samples. Lanes are visited in turn: neighbors in the text are read as many visits apart as there are lanes,
while what has been read of each lane is a prefix.

    visits of a cut of 11 samples into 3 lanes      after 5 visits, the stream of what is unread
    lane 0   0  3  6  9                             lane 0         6  9
    lane 1   1  4  7 10                             lane 1         7 10
    lane 2   2  5  8                                lane 2      5  8

**A change of seq_length** ends a cut. The next one divides the stream of what is unread: the rest of each lane, lane
by lane, and the tail that was too short for a sample. Each rest is contiguous text, and so is a longer sample, unless
it crosses from one rest to the next; there are at most as many such seams as the cut had lanes. Both steps are
arithmetic on a few integers: no list of samples exists anywhere.

**The state** of a set is therefore its epoch and, for each cut of this epoch, (seq_length, visits). Weights, other
sets, batch sizes, ranks, restarts and growth do not appear in it: they only decide when the set's next sample is read.

**What is left out.** Tokens too few for one more sample at the end of an epoch are its tail, shorter than seq_length.
They are counted in `left_out`. If seq_length changes before the next epoch starts, the next cut still reads them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from megatron_tf.data.indexed_dataset import DataError

MOST_CUTS = 32
"""Cuts within one epoch of a set: with as many, its state is still smaller than 1 KB."""

Span = tuple[int, int]
"""Targets [start, stop) of a stream."""


@dataclass(frozen=True)
class LanePosition:
    """How far a set has been read: the whole state of its order."""

    epoch: int = 0
    cuts: tuple[tuple[int, int], ...] = ()
    """(seq_length, visits) of each cut of this epoch, oldest first; visits are at least 1."""
    left_out: int = 0
    """Tokens of all earlier epochs that no sample had as a target."""

    def read_of_epoch(self) -> int:
        """Return how many tokens of this epoch have been read."""
        return sum(seq_length * visits for seq_length, visits in self.cuts)

    def next_epoch(self, tokens: int) -> Self:
        """Return the start of the next epoch: what is unread of this one, of `tokens` tokens, is left out."""
        if not self.cuts:
            return self
        return replace(self, epoch=self.epoch + 1, cuts=(), left_out=self.left_out + tokens - self.read_of_epoch())

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        cuts = tuple((int(length), int(visits)) for length, visits in values["cuts"])
        return cls(int(values["epoch"]), cuts, int(values["left_out"]))

    def to_json(self) -> dict[str, Any]:
        """Return the position as JSON values, smaller than 1 KB."""
        return {"epoch": self.epoch, "cuts": [list(cut) for cut in self.cuts], "left_out": self.left_out}


START = LanePosition()
"""The position of a set that has not been read."""


@dataclass(frozen=True)
class Cut:
    """A stream of `tokens` targets in samples of `seq_length`, which lanes read in turn."""

    tokens: int
    seq_length: int

    @cached_property
    def samples(self) -> int:
        """Number of samples; the targets after the last one are the tail."""
        return self.tokens // self.seq_length

    @cached_property
    def lanes(self) -> int:
        """Number of lanes: as many as a lane has samples, so that both neighbors in the text are far apart, and the
        rest of a lane is long enough for longer samples."""
        return max(1, math.isqrt(self.samples))

    def sample(self, visit: int) -> Span:
        """Return the targets of the sample that is read as number `visit`."""
        turn, lane = divmod(visit, self.lanes)
        start = (self._first(lane) + turn) * self.seq_length
        return start, start + self.seq_length

    def unread(self, visits: int, span: Span) -> Iterator[Span]:
        """Yield the pieces of this stream that are `span` in the stream of what is unread after `visits`."""
        start, stop = span
        while start < stop:
            place, end = self._unread_place(visits, start)
            length = min(stop, end) - start
            yield place, place + length
            start += length

    def _unread_place(self, visits: int, start: int) -> Span:
        """Return (the place of unread target `start` in this stream, the unread target at which its rest ends)."""
        left = self.samples - visits
        sample, offset = divmod(start, self.seq_length)
        if sample >= left:
            tail = self.samples * self.seq_length
            return tail + start - left * self.seq_length, self.tokens - visits * self.seq_length
        # the last lane that starts at or before the sample; lanes without a rest start where the next one does
        lane = bisect_right(range(self.lanes), sample, key=lambda lane: self._unread_first(visits, lane)) - 1
        number = self._first(lane) + self._read(visits, lane) + sample - self._unread_first(visits, lane)
        return number * self.seq_length + offset, self._unread_first(visits, lane + 1) * self.seq_length

    def _first(self, lane: int) -> int:
        """Return the number of the lane's first sample in the stream; the first lanes have one sample more."""
        each, extra = divmod(self.samples, self.lanes)
        return lane * each + min(lane, extra)

    def _read(self, visits: int, lane: int) -> int:
        """Return how many of the lane's samples have been read after `visits`."""
        turns, extra = divmod(visits, self.lanes)
        return turns + (lane < extra)

    def _unread_first(self, visits: int, lane: int) -> int:
        """Return how many unread samples come before the lane's."""
        turns, extra = divmod(visits, self.lanes)
        return self._first(lane) - lane * turns - min(lane, extra)


class LaneOrder:
    """The order of a set of `tokens` tokens from a position on, at one sequence length; samples count from there.

    Raises DataError if the set is too small for one sample, or if its sequence length changed too often in this epoch.
    """

    def __init__(self, tokens: int, *, seq_length: int, name: str, start: LanePosition = START) -> None:
        self.tokens = tokens
        self.seq_length = seq_length
        self._whole = Cut(tokens, seq_length)
        if not self._whole.samples:
            raise DataError(
                f"{name} has {tokens:,} tokens, too few for one sample of {seq_length}: give more data, another "
                f"split, or a smaller training.seq_length"
            )
        self._start = start
        self._earlier, self._visits = start.cuts, 0
        # a change back to the length of the latest cut, or of something else than the length, continues that cut
        if start.cuts and start.cuts[-1][0] == seq_length:
            self._earlier, self._visits = start.cuts[:-1], start.cuts[-1][1]
        if len(self._earlier) >= MOST_CUTS:
            raise DataError(
                f"{name} has had {MOST_CUTS} sequence lengths in its current epoch, as many as a checkpoint records: "
                f"change training.seq_length in larger steps"
            )
        self._levels = tuple(_levels(tokens, self._earlier))
        self._cut = Cut(tokens - sum(length * visits for length, visits in self._earlier), seq_length)
        self._left = max(0, self._cut.samples - self._visits)

    def locate(self, sample: int) -> tuple[int, list[Span]]:
        """Return (epoch, targets of the sample as spans of the epoch's ring of tokens)."""
        if sample < self._left:
            spans = [self._cut.sample(self._visits + sample)]
            for cut, visits in reversed(self._levels):
                spans = _joined(piece for span in spans for piece in cut.unread(visits, span))
            return self._start.epoch, spans
        epochs, visit = divmod(sample - self._left, self._whole.samples)
        return self._start.epoch + 1 + epochs, [self._whole.sample(visit)]

    def after(self, samples: int) -> LanePosition:
        """Return the position after this many samples. An epoch ends when the first sample of the next one is read."""
        if not samples:
            return self._start
        if samples <= self._left:
            return replace(self._start, cuts=(*self._earlier, (self.seq_length, self._visits + samples)))
        epochs, visit = divmod(samples - self._left - 1, self._whole.samples)
        return LanePosition(
            epoch=self._start.epoch + 1 + epochs,
            cuts=((self.seq_length, visit + 1),),
            left_out=self._start.left_out + self._tail + epochs * (self.tokens % self.seq_length),
        )

    @property
    def _tail(self) -> int:
        """Targets of the current epoch after its last sample."""
        return self._cut.tokens - (self._visits + self._left) * self.seq_length


def _levels(tokens: int, cuts: tuple[tuple[int, int], ...]) -> Iterator[tuple[Cut, int]]:
    """Yield each earlier cut of an epoch, of what the one before left unread, with its visits."""
    for seq_length, visits in cuts:
        yield Cut(tokens, seq_length), visits
        tokens -= seq_length * visits


def _joined(spans: Iterator[Span]) -> list[Span]:
    """Join spans that follow each other in the text."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined
