"""Time until a run's first sample, and the memory of a rank, under each order of samples.

    python -m benchmarks.data.first_sample [--documents N]

Every reading is a process of its own on the same dataset, with a new cache for each turn: the first rank builds what
its order stores, and the next rank of the host finds it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.data.order import SEQ_LENGTH, data_set, document_lengths, timed
from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.build import build_dataset

ROOT = Path(__file__).parents[2]
ORDERS = ("lanes", "counter")


def read_first(prefix: str, order: str, cache: str) -> None:
    """Print the seconds and the growth of memory until the first sample is read."""
    model = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 60_000}
    config = parse_config(
        RunConfig,
        {
            "model": model | dict.fromkeys(("qkv_tokens", "proj_tokens", "ffn_tokens"), 1),
            "training": {
                "seq_length": SEQ_LENGTH,
                "micro_batch_size": 1,
                "global_batch_size": 1,
                "train_iters": 1000,
            },
            "optimizer": {"lr": 1e-3},
            "data": {
                "data_path": [prefix],
                "data_cache_path": cache,
                "tokenizer_type": "NullTokenizer",
                "split": "1,0,0",
                "order": order,
            },
        },
        "benchmark",
    )
    timed(lambda: build_dataset(config)[0])


def read_in_process(*arguments: str) -> dict[str, float]:
    """Return what `read_first` reports from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data.first_sample", "--read", *arguments]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout)
    return found


def main() -> None:
    """Print a table of the turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--read", nargs=3, metavar=("PREFIX", "ORDER", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read_first(*args.read)
        return
    print(
        "| order | rank of the host | seconds | MiB of memory | bytes stored for each document |\n|---|---|---|---|---|"
    )
    with data_set(document_lengths(args.documents)) as prefix:
        for _ in range(args.turns):
            for order in ORDERS:
                with tempfile.TemporaryDirectory() as cache:
                    for rank in ("first", "next"):
                        found = read_in_process(prefix, order, cache)
                        stored = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
                        cells = f"{found['seconds']:.2f}", f"{found['mib']:.0f}", f"{stored / args.documents:.1f}"
                        print("|", " | ".join((order, rank, *cells)), "|", flush=True)


if __name__ == "__main__":
    main()
