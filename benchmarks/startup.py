"""Time from launch to the first step of a small model on two data-parallel ranks under torchrun, with cached data.

    python benchmarks/startup.py [--repeat N]

Exits with code 1 if the median exceeds LIMIT_SECONDS.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index

LIMIT_SECONDS = 15.0
RUN = {
    "model": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "qkv_tokens": 128,
        "proj_tokens": 128,
        "ffn_tokens": 512,
        "vocab_size": 257,
    },
    "training": {"seq_length": 256, "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 1},
    "optimizer": {"lr": 1e-3},
    "data": {"split": "1,0,0", "tokenizer_type": "NullTokenizer"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder))
        first_run(config)  # builds the order of samples and warms the page cache
        times = [first_run(config) for _ in range(args.repeat)]
        interpreter = statistics.median(timed([sys.executable, "-c", "import torch"]) for _ in range(args.repeat))
    median = statistics.median(times)
    print(f"launch to first step: median {median:.1f} s of {args.repeat} ({min(times):.1f} to {max(times):.1f})")
    print(f"of that python and torch alone: {interpreter:.1f} s (twice, in torchrun and in its ranks)")
    return int(median > LIMIT_SECONDS)


def prepare(folder: Path) -> Path:
    """Write random data and the configuration."""
    prefix = folder / "data"
    np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint16).tofile(f"{prefix}.bin")
    lengths = np.full(1 << 10, 1 << 10, dtype=np.int32)
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), blocks_of_documents(lengths))
    RUN["data"]["data_path"] = [str(prefix)]
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(RUN | {"logging": {"metrics_file": str(folder / "metrics.jsonl")}}))
    return config


def first_run(config: Path) -> float:
    """Return the seconds until the metrics contain the first step."""
    metrics = config.with_name("metrics.jsonl")
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        [*launcher, "-m", "megatron_tf.pretrain", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not has_step(metrics):
        if job.poll() not in (None, 0):
            raise SystemExit(f"the run failed with code {job.returncode}")
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    job.wait()
    return seconds


def has_step(metrics: Path) -> bool:
    if not metrics.exists():
        return False
    return any("loss" in json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line[-1] == "\n")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
