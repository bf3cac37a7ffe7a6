"""Megatron-LM's order of samples, bit for bit, for runs that are moved here from there.

It depends on how many samples a run will take: E epochs are shuffled together, and the samples over all of them; the
last epoch apart from the others where only a part of it is needed. One numpy RandomState draws everything. What
Megatron-LM shuffles and splits are the sequences of a dataset, whatever documents they belong to.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf.data._index import sample_index
from megatron_tf.data.gpt_dataset import shares_of
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.order import aligned, samples_in
from megatron_tf.data.order_cache import OrderArrays, open_or_build

ORDER_VERSION = 1
PARTIAL_EPOCH = 0.80  # the last epoch is shuffled apart when less than this share of it is needed
BLEND_SURPLUS = 0.005  # samples that each part of a blend is given beyond its share
_SHORT_IDS = 1 << 32  # places in the order of sequences, up to which 32 bits count them


class MegatronOrder:
    """The first `samples` samples of a run, then the same from the beginning; None for the samples of one epoch.

    `lengths` are of sequences. A set with fewer tokens than one sample is read for as many epochs as it takes. Raises
    DataError where there is no token, and where one epoch is asked of a set that has no whole sample.
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
        self._arrays = open_or_build(cache, key, self._build)

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """(arrays, the sample's place in them)."""
        # a run that skipped batches reads further than Megatron-LM planned, and begins again
        return self._arrays, int(self._arrays.shuffle[sample % len(self._arrays.shuffle)])

    def _build(self) -> OrderArrays:
        tokens = self._tokens
        length = self.seq_length
        epochs = max(1, -(-(self.samples * length + 1) // tokens))
        # a sample needs one token beyond its length: the target of its last one
        without_last = ((epochs - 1) * tokens - 1) // length
        is_partial = epochs > 1 and self.samples - without_last < int(PARTIAL_EPOCH * ((tokens - 1) // length))
        # what is drawn, and when, is Megatron-LM's: sequences of all parts first, then samples part by part
        random = np.random.RandomState(self.seed)
        parts = [epochs - 1, 1] if is_partial else [epochs]
        # the type of the ids counts places among all epochs too
        ids = np.dtype(np.uint32 if epochs * len(self.lengths) < _SHORT_IDS else np.int64)
        sequences = np.concatenate([self._shuffled_sequences(part, ids, random) for part in parts])
        position, offset = sample_index(sequences, self.lengths, length)
        borders = [0, without_last, len(position) - 1] if is_partial else [0, len(position) - 1]
        shuffle = np.arange(len(position) - 1, dtype=np.int64)
        for begin, end in itertools.pairwise(borders):
            random.shuffle(shuffle[begin:end])
        return OrderArrays(sequences, position, offset, shuffle)

    def _shuffled_sequences(self, epochs: int, ids: np.dtype, random: np.random.RandomState) -> NDArray[np.integer]:
        sequences = np.tile(np.arange(len(self.lengths), dtype=ids), epochs)
        random.shuffle(sequences)
        return sequences


def split_sequences(num_sequences: int, split: str) -> tuple[range, range, range]:
    """Sequences of training, validation and test for shares such as "969,30,1". Raises DataError for others.

    Megatron-LM rounds after it has added up rounded shares, so that bounds may be off by one from those of documents.
    """
    ends = [0.0, *itertools.accumulate(normalised(shares_of(split)))]
    bounds = [round(end * float(num_sequences)) for end in ends]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])


def samples_of_parts(samples: int, weights: Sequence[float]) -> list[int]:
    """Samples that Megatron-LM prepares of each dataset of a blend."""
    shares = normalised(weights)
    return [math.ceil(math.ceil(samples * share) * (1 + BLEND_SURPLUS)) for share in shares]


def normalised(weights: Sequence[float]) -> list[float]:
    """Shares of a whole, rounded as Megatron-LM does: in its blends the last bit decides which of two comes first."""
    values = np.array(weights, dtype=np.float64)
    shares: list[float] = (values / np.sum(values)).tolist()
    return shares
