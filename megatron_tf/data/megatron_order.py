"""Megatron-LM's order of samples, bit for bit, for runs migrated from there.

It depends on the total number of samples of a run: the sequences of all its epochs are shuffled together, then the
samples over all of them; the last epoch is shuffled separately if only a small part of it is needed. All random numbers
come from one numpy RandomState. Megatron-LM shuffles and splits the sequences of a dataset, not its documents.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data._index import sample_index
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.order import aligned, samples_in
from megatron_tf.data.order_cache import OrderArrays, open_or_build

ORDER_VERSION = 1
PARTIAL_EPOCH = 0.80  # the last epoch is shuffled separately if less than this fraction of it is needed
BLEND_SURPLUS = 0.005  # margin of samples prepared for each part of a blend beyond its share
_SHORT_IDS = 1 << 32  # up to this many entries in the order of sequences, 32 bits suffice


class MegatronOrder:
    """The order of the first `samples` samples of a run, after which it repeats; None means those of one epoch.

    `lengths` are the lengths of sequences. A dataset with fewer tokens than one sample is read for as many epochs as
    needed. Raises DataError if there are no tokens, or if one epoch has no complete sample.
    """

    def __init__(
        self, lengths: NDArray[np.integer], *, seq_length: int, seed: int, name: str, cache: Path, samples: int | None
    ) -> None:
        self.lengths = aligned(lengths)
        self.seq_length = seq_length
        self.seed = seed
        self._tokens = int(self.lengths.sum(dtype=np.int64))
        if not self._tokens:
            raise DataError(f"{name} has no tokens: give more data, or another split")
        self.samples = samples or samples_in(self.lengths, seq_length, name)
        content = xxhash.xxh3_128_hexdigest(self.lengths.data)
        key = ("megatron", ORDER_VERSION, content, seq_length, seed, self.samples)
        self._stored = open_or_build(cache, key, self._build)

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """Return (arrays, index of the sample in them)."""
        # a run that skipped batches reads further than Megatron-LM planned, and wraps around
        self._stored.check()
        arrays = self._stored.arrays
        return arrays, int(arrays.shuffle[sample % len(arrays.shuffle)])

    def _build(self) -> OrderArrays:
        tokens = self._tokens
        length = self.seq_length
        epochs = max(1, -(-(self.samples * length + 1) // tokens))
        # a sample needs one token more than its length: the target of the last one
        without_last = ((epochs - 1) * tokens - 1) // length
        is_partial = epochs > 1 and self.samples - without_last < int(PARTIAL_EPOCH * ((tokens - 1) // length))
        # the draws follow Megatron-LM's sequence: the sequences of all parts first, then the samples of each part
        random = np.random.RandomState(self.seed)
        parts = [epochs - 1, 1] if is_partial else [epochs]
        # the type of the ids must also hold positions over all epochs
        ids = np.dtype(np.uint32 if epochs * len(self.lengths) < _SHORT_IDS else np.int64)
        sequences = np.concatenate([self._shuffled_sequences(part, ids, random) for part in parts])
        position, offset = sample_index(sequences, self.lengths, length)
        borders = [0, without_last, len(position) - 1] if is_partial else [0, len(position) - 1]
        shuffle = np.arange(len(position) - 1, dtype=np.int64)
        for begin, end in itertools.pairwise(borders):
            random.shuffle(shuffle[begin:end])
        return OrderArrays(documents=sequences, position=position, offset=offset, shuffle=shuffle)

    def _shuffled_sequences(self, epochs: int, ids: np.dtype, random: np.random.RandomState) -> NDArray[np.integer]:
        sequences = np.tile(np.arange(len(self.lengths), dtype=ids), epochs)
        random.shuffle(sequences)
        return sequences


def split_sequences(num_sequences: int, shares: Sequence[float]) -> tuple[range, range, range]:
    """Split sequences into training, validation and test by their shares.

    Megatron-LM rounds sums of rounded shares, so boundaries may differ by one from those of `split_documents`.
    """
    ends = [0.0, *itertools.accumulate(normalized(shares))]
    bounds = [round(end * float(num_sequences)) for end in ends]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])


def samples_of_parts(samples: int, weights: Sequence[float]) -> list[int]:
    """Return the number of samples that Megatron-LM prepares of each dataset of a blend."""
    shares = normalized(weights)
    return [math.ceil(math.ceil(samples * share) * (1 + BLEND_SURPLUS)) for share in shares]


def normalized(weights: Sequence[float]) -> list[float]:
    """Normalize weights to sum to 1, rounded as in Megatron-LM: in its blends the last bit can decide ties."""
    values = np.array(weights, dtype=np.float64)
    shares: list[float] = (values / np.sum(values)).tolist()
    return shares
