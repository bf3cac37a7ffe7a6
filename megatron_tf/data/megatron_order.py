"""Megatron-LM's order of samples, bit for bit, for runs that are moved here from there.

It depends on how many samples a run will take: E epochs of documents are shuffled together, and the samples over all of
them; the last epoch apart from the others where only a part of it is needed. One numpy RandomState draws everything.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_tf._index import sample_index
from megatron_tf.data.order import aligned, samples_in
from megatron_tf.data.order_cache import OrderArrays, open_or_build

ORDER_VERSION = 1
PARTIAL_EPOCH = 0.80  # the last epoch is shuffled apart when less than this share of it is needed
BLEND_SURPLUS = 0.005  # samples that each part of a blend is given beyond its share


class MegatronOrder:
    """The first `samples` samples of a run, and then from the beginning again. Raises DataError where there are too few
    tokens for one."""

    def __init__(
        self, lengths: NDArray[np.integer], seq_length: int, seed: int, name: str, cache: Path, samples: int
    ) -> None:
        self.lengths, self.seq_length, self.seed, self.samples = aligned(lengths), seq_length, seed, samples
        samples_in(self.lengths, seq_length, name)
        content = xxhash.xxh3_128_hexdigest(self.lengths.data)
        key = ("megatron", ORDER_VERSION, content, seq_length, seed, samples)
        self._arrays = open_or_build(cache, key, self._build)

    def locate(self, sample: int) -> tuple[OrderArrays, int]:
        """(arrays, the sample's place in them)."""
        # a run that skipped batches reads further than Megatron-LM planned, and begins again
        return self._arrays, int(self._arrays.shuffle[sample % len(self._arrays.shuffle)])

    def _build(self) -> OrderArrays:
        tokens, length = int(self.lengths.sum(dtype=np.int64)), self.seq_length
        epochs = max(1, -(-(self.samples * length + 1) // tokens))
        without_last = ((epochs - 1) * tokens - 1) // length
        is_partial = epochs > 1 and self.samples - without_last < int(PARTIAL_EPOCH * ((tokens - 1) // length))
        random = np.random.RandomState(self.seed)
        parts = [epochs - 1, 1] if is_partial else [epochs]
        documents = np.concatenate([self._shuffled_documents(part, random) for part in parts])
        position, offset = sample_index(documents, self.lengths, length)
        borders = [0, without_last, len(position) - 1] if is_partial else [0, len(position) - 1]
        shuffle = np.arange(len(position) - 1, dtype=np.int64)
        for begin, end in itertools.pairwise(borders):
            random.shuffle(shuffle[begin:end])
        return OrderArrays(documents, position, offset, shuffle)

    def _shuffled_documents(self, epochs: int, random: np.random.RandomState) -> NDArray[np.uint32]:
        documents = np.tile(np.arange(len(self.lengths), dtype=np.uint32), epochs)
        random.shuffle(documents)
        return documents


def samples_of_part(samples: int, weight: float, total_weight: float) -> int:
    """Samples one data set of a blend is asked for."""
    return math.ceil(math.ceil(samples * (weight / total_weight)) * (1 + BLEND_SURPLUS))
