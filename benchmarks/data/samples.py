"""Samples of 2048 tokens per second from a memory-mapped dataset, against Megatron-LM's GPTDataset in the same run.

Needs `pip install --no-deps megatron-core`. Pass the prefix of a dataset written by tools/preprocess_data.py, ideally
of 1 GB: python benchmarks/data/samples.py PREFIX
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.indexed_dataset import IndexedDataset
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.order import SampleOrder

SEQ_LENGTH, SAMPLES, BATCH, TURNS = 2048, 8192, 256, 5


def order_of(data: IndexedDataset, cache: str) -> SampleOrder:
    """Return the sample order of all its documents."""
    return SampleOrder(data.document_lengths, seq_length=SEQ_LENGTH, seed=1, name="train", cache=Path(cache))


def rate(read: Callable[[], None], turns: int = TURNS) -> float:
    """Return the samples per second of the fastest turn."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return SAMPLES / min(times)


def cold_rate(prefix: str, cache: str, prefetch: int) -> float:
    """Return the samples per second of a file outside the page cache, with `prefetch` samples prefetched."""
    data = IndexedDataset(prefix)
    dataset = GPTDataset(data, range(len(data)), order_of(data, cache))
    dataset[0]

    def read() -> None:
        for first in range(0, SAMPLES, BATCH):
            for i in range(first, first + prefetch):
                dataset.prefetch(i)
            for i in range(first, first + BATCH):
                dataset[i]

    with Path(f"{prefix}.bin").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drops pages that are not mapped
    return rate(read, 1)


def megatron_dataset(prefix: str, cache: str) -> Any:
    """Build Megatron-LM's dataset over all documents."""
    from megatron.core.datasets import gpt_dataset, indexed_dataset
    from megatron.core.datasets.utils import Split

    class NoTokenizer:
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012
        eod = pad = 0
        vocab_size = 50_000

    low = indexed_dataset.IndexedDataset(prefix)
    resets = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    folders = {"path_to_cache": cache, "split": "1,0,0"}
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH, tokenizer=NoTokenizer(), **folders, **resets
    )
    documents = np.arange(len(low.document_indices) - 1, dtype=np.int32)
    return gpt_dataset.GPTDataset(low, prefix, documents, SAMPLES, Split.train, config)


def main() -> None:
    """Print a line for each access pattern."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix")
    prefix = parser.parse_args().prefix
    with tempfile.TemporaryDirectory() as cache:
        for name, prefetch in [
            ("ours, cold file, as it comes", 0),
            ("ours, cold file, a batch prefetched", BATCH),
        ]:
            print(f"{name:<44}{cold_rate(prefix, cache, prefetch):>10,.0f} samples/s", flush=True)
        data = IndexedDataset(prefix)
        dataset = GPTDataset(data, range(len(data)), order_of(data, cache))
        theirs = megatron_dataset(prefix, cache)

        def ours() -> None:
            for i in range(SAMPLES):
                dataset[i]

        def loader() -> None:
            with BatchLoader(
                dataset,
                batch_size=lambda _: BATCH,
                micro_batch_size=8,
                replica=0,
                replicas=1,
                consumed_samples=0,
                masking=DocumentMasking(0),
            ) as batches:
                for _ in range(SAMPLES // BATCH):
                    next(batches)

        def megatron() -> None:
            for i in range(SAMPLES):
                theirs[i]

        for name, read in [
            ("ours, one thread", ours),
            ("ours, through the loader", loader),
            ("Megatron-LM, one thread", megatron),
        ]:
            print(f"{name:<44}{rate(read):>10,.0f} samples/s", flush=True)


if __name__ == "__main__":
    main()
