"""Time and memory of sample orders, blends and index files, against Megatron-LM in the same run.

Needs `pip install --no-deps megatron-core` (its wheel holds the compiled helpers). Each job runs in a separate process,
which reports seconds and the growth of its peak memory. Run: python benchmarks/data/order.py [--turns K]

With --first-sample, without Megatron-LM: what a run needs until its first sample, under each order. The first rank of a
host builds what its order stores, with a new cache for each turn, and the next rank finds it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

SEQ_LENGTH, MEAN_TOKENS = 2048, 500
BLENDED, DATA_SETS = 100_000_000, 22
ORDERS = ("lanes", "counter")
BLOCK = 1024  # steps of a blend computed at a time


def document_lengths(count: int) -> NDArray[np.int32]:
    """Draw document lengths like those of the Pile: many short, some long, with a mean of MEAN_TOKENS."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(0.0, 1.2, count)
    return np.maximum(1, lengths * (MEAN_TOKENS / lengths.mean())).astype(np.int32)


def weights() -> NDArray[np.float64]:
    """Return weights roughly like those of the Pile's sets."""
    return np.random.default_rng(1).lognormal(0.0, 1.0, DATA_SETS)


def ours_order(lengths: NDArray[np.int32], epochs: int) -> None:
    """Build the order, from an open dataset to memory-mapped arrays of each epoch, cached on disk."""
    from megatron_tf.data.indexed_dataset import IndexedDataset
    from megatron_tf.data.order import SampleOrder

    with data_set(lengths) as prefix:
        dataset = IndexedDataset(prefix)

        def build() -> None:
            order = SampleOrder(
                dataset.document_lengths, seq_length=SEQ_LENGTH, seed=1, name="train", cache=Path(f"{prefix}-cache")
            )
            for epoch in range(epochs):
                order.locate(epoch * order.samples_per_epoch)

        timed(build)


def megatron_order(lengths: NDArray[np.int32], epochs: int) -> None:
    """Do the same with Megatron-LM's GPTDataset."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    with data_set(lengths) as prefix:
        dataset = IndexedDataset(prefix)
        samples = (int(lengths.sum(dtype=np.int64)) * epochs - 1) // SEQ_LENGTH
        resets = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
        folders = {"path_to_cache": f"{prefix}-cache", "split": "1,0,0"}
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=SEQ_LENGTH, tokenizer=NoTokenizer(), **folders, **resets
        )
        documents = np.arange(len(lengths), dtype=np.int32)
        timed(lambda: GPTDataset(dataset, prefix, documents, samples, Split.train, config))


class NoTokenizer:
    """The attributes of a tokenizer that Megatron-LM's dataset requires."""

    unique_identifiers: ClassVar[dict[str, str]] = {}
    eod = pad = 0
    vocab_size = 50_000


@contextmanager
def data_set(lengths: NDArray[np.int32]) -> Iterator[str]:
    """Write a dataset of documents of these lengths; its token file is sparse."""
    from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index

    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/d"
        write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), blocks_of_documents(lengths))
        with Path(f"{prefix}.bin").open("wb") as file:
            file.truncate(2 * int(lengths.sum(dtype=np.int64)))
        yield prefix


def ours_samples(lengths: NDArray[np.int32], _: int) -> None:
    """Build only the sample index, of documents in a random order."""
    from megatron_tf.data._index import sample_index

    documents = np.random.default_rng(2).permutation(len(lengths)).astype(np.uint32)
    timed(lambda: sample_index(documents, lengths, SEQ_LENGTH))


def megatron_samples(lengths: NDArray[np.int32], _: int) -> None:
    """Do the same with Megatron-LM's compiled helper."""
    from megatron.core.datasets import helpers_cpp

    tokens = int(lengths.sum(dtype=np.int64))
    documents = np.random.default_rng(2).permutation(len(lengths)).astype(np.int32)
    timed(lambda: helpers_cpp.build_sample_idx_int32(lengths, documents, SEQ_LENGTH, 1, tokens, True, 1))


def ours_blend(_: NDArray[np.int32], __: int) -> None:
    """Blend 100 M samples of 22 datasets, a block of steps at a time."""
    from megatron_tf.data.blend import SpacedBlend

    blend = SpacedBlend(weights().tolist())

    def read() -> None:
        for first in range(0, BLENDED, BLOCK):
            blend.steps(first, BLOCK)

    timed(read)


def ours_resumed_blend(_: NDArray[np.int32], __: int) -> None:
    """Compute only the last of them, as a resumed run needs."""
    from megatron_tf.data.blend import SpacedBlend

    timed(lambda: SpacedBlend(weights().tolist()).locate(BLENDED - 1))


def ours_greedy_blend(_: NDArray[np.int32], __: int) -> None:
    """Blend 100 M samples in the order of version 0.1 and of Megatron-LM."""
    from megatron_tf.data._index import greedy_blend

    timed(lambda: greedy_blend(weights(), BLENDED))


def megatron_blend(_: NDArray[np.int32], __: int) -> None:
    """Do the same with Megatron-LM's compiled helper."""
    from megatron.core.datasets import helpers_cpp

    shares = weights() / weights().sum()
    datasets, samples = np.zeros(BLENDED, dtype=np.int16), np.zeros(BLENDED, dtype=np.int64)
    timed(lambda: helpers_cpp.build_blending_indices(datasets, samples, shares, DATA_SETS, BLENDED, False))


def ours_index(lengths: NDArray[np.int32], _: int) -> None:
    """Write the .idx."""
    from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index

    with tempfile.TemporaryDirectory() as folder:
        timed(lambda: write_index(Path(folder) / "d.idx", np.dtype(np.uint16), blocks_of_documents(lengths)))


def megatron_index(lengths: NDArray[np.int32], _: int) -> None:
    """Do the same with Megatron-LM's writer, which takes lists."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    sequence_lengths, bounds = lengths.tolist(), list(range(len(lengths) + 1))

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder, _IndexWriter(f"{folder}/d.idx", np.uint16) as writer:
            writer.write(sequence_lengths, None, bounds)

    timed(write)


JOBS: list[tuple[str, Callable[..., None], Callable[..., None], int]] = [
    ("the order from a data set on disk, 1 epoch", ours_order, megatron_order, 1),
    ("the order from a data set on disk, 3 epochs", ours_order, megatron_order, 3),
    ("sample index alone", ours_samples, megatron_samples, 1),
    ("blend, 100 M of 22", ours_blend, megatron_blend, 1),
    ("blend of 22, step 100 M alone", ours_resumed_blend, megatron_blend, 1),
    ("greedy blend, 100 M of 22", ours_greedy_blend, megatron_blend, 1),
    (".idx", ours_index, megatron_index, 1),
]


def timed(job: Callable[[], None]) -> None:
    """Print time and memory of `job` as JSON."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = private_mib("VmRSS"), time.perf_counter()
    job()
    print(json.dumps({"seconds": time.perf_counter() - start, "mib": private_mib("VmHWM") - before}))


def private_mib(field: str) -> float:
    """Return `field` of this process's memory, in MiB; mapped files count while they are resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def run_job(number: int, side: int, documents: int) -> None:
    """Run one side of a job, in a separate process."""
    _, *sides, epochs = JOBS[number]
    job, lengths = sides[side], document_lengths(documents)
    job(lengths, epochs)


def measure(number: int, side: int, documents: int) -> dict[str, float]:
    """Return the report of a job's process."""
    return report_of("--job", str(number), str(side), "--documents", str(documents))


def report_of(*arguments: str) -> dict[str, float]:
    """Return what `timed` prints in a process of its own."""
    out = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


def read_first(prefix: str, order: str, cache: str) -> None:
    """Read the first sample of a run, in a separate process."""
    from megatron_tf.config import RunConfig, parse_config
    from megatron_tf.data.build import build_dataset

    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 60_000}
    training = {"seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1000}
    data = {"data_path": [prefix], "data_cache_path": cache, "split": "1,0,0", "order": order}
    values = {
        "model": model | dict.fromkeys(("qkv_tokens", "proj_tokens", "ffn_tokens"), 1),
        "training": training,
        "optimizer": {"lr": 1e-3},
        "data": data | {"tokenizer_type": "NullTokenizer"},
    }
    config = parse_config(RunConfig, values, "benchmark")
    timed(lambda: build_dataset(config)[0])


def print_first_samples(documents: int, turns: int) -> None:
    """Print the table of --first-sample."""
    print(
        "| order | rank of the host | seconds | MiB of memory | bytes stored for each document |\n|---|---|---|---|---|"
    )
    with data_set(document_lengths(documents)) as prefix:
        for _ in range(turns):
            for order in ORDERS:
                with tempfile.TemporaryDirectory() as cache:
                    for rank in ("first", "next"):
                        found = report_of("--read", prefix, order, cache)
                        stored = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
                        cells = f"{found['seconds']:.2f}", f"{found['mib']:.0f}", f"{stored / documents:.1f}"
                        print("|", " | ".join((order, rank, *cells)), "|", flush=True)


def main() -> None:
    """Print a table of the best of several turns, each of which runs both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--job", nargs=2, type=int, metavar=("NUMBER", "SIDE"), help=argparse.SUPPRESS)
    parser.add_argument("--first-sample", action="store_true", help="measure what a run needs until its first sample")
    parser.add_argument("--read", nargs=3, metavar=("PREFIX", "ORDER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_first(*args.read)
        return
    if args.first_sample:
        print_first_samples(args.documents, args.turns)
        return
    if args.job:
        run_job(*args.job, args.documents)
        return
    print(f"{args.documents:,} documents of {MEAN_TOKENS} tokens on average, samples of {SEQ_LENGTH}")
    print("| job | ours | Megatron-LM | ratio | ours, MiB | Megatron-LM, MiB |\n|---|---|---|---|---|---|")
    for number, (name, *_) in enumerate(JOBS):
        turns = [[measure(number, side, args.documents) for side in (0, 1)] for _ in range(args.turns)]
        seconds = [min(turn[side]["seconds"] for turn in turns) for side in (0, 1)]
        mib = [max(turn[side]["mib"] for turn in turns) for side in (0, 1)]
        print(
            f"| {name} | {seconds[0]:.2g} s | {seconds[1]:.2f} s | {seconds[1] / seconds[0]:.1f} "
            f"| {mib[0]:,.0f} | {mib[1]:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
