"""Cost of saving: the stall of a background save, the write rate, and the share of the checksums.

One process trains a model of about 38 M parameters (a checkpoint of 450 MB); the same steps are timed without a save,
with a background save, and with a synchronous save.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
import xxhash

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.step.state import TrainState, build_state
from megatron_tf.training.step.step import train_step

STEPS = 6
MODEL = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "qkv_tokens": 512,
    "proj_tokens": 512,
    "ffn_tokens": 2048,
    "vocab_size": 8192,
}
RUN = {
    "model": MODEL,
    "training": {"seq_length": 256, "micro_batch_size": 4, "global_batch_size": 4, "train_iters": 1000},
    "optimizer": {"lr": 1e-3},
    "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
}


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    config = parse_config(RunConfig, RUN, "benchmark")
    state = build_state(config, Mesh(torch.device("cpu")))
    batch = Batch(torch.randint(8192, (1, 4, 257)), torch.arange(4)[None], 4 * 256)
    record = new_record(config, {})
    train_step(state, batch, 1e-3)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for turn in range(args.turns):
        note("steps without a save", steps(state, batch))
        step = record.after_step(turn + 1, 0, 0.0)
        start = time.perf_counter()
        save_state(state, config, step, root=args.directory / "waiting")
        note("a save that training waits for", time.perf_counter() - start)
        stall, both, whole = in_background(state, config, batch, record=step, root=args.directory / "background")
        note("stall of a save in the background", stall)
        note("steps while it is written", both)
        note("from the call until it is complete", whole)
        note("checksums of its bytes", hashing(args.directory / "waiting"))
        size = sum(path.stat().st_size for path in (args.directory / "waiting").rglob("*.safetensors"))
        shutil.rmtree(args.directory / "waiting")
        shutil.rmtree(args.directory / "background")
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(f"{size:,} bytes, {STEPS} steps at a time, medians of {args.turns} turns\n\n| what | seconds |\n|---|---|")
    for name, seconds in middle.items():
        print(f"| {name} | {seconds:.3f} |")
    waiting = middle["a save that training waits for"]
    print(
        f"\nsaving {size / waiting / 1e9:.2f} GB/s; checksums {middle['checksums of its bytes'] / waiting:.1%} of it; "
        f"stall in the background {middle['stall of a save in the background'] / waiting:.1%} of it"
    )


def steps(state: TrainState, batch: Batch) -> float:
    """Measure several steps, in seconds."""
    start = time.perf_counter()
    for _ in range(STEPS):
        train_step(state, batch, 1e-3)
    return time.perf_counter() - start


def in_background(
    state: TrainState, config: RunConfig, batch: Batch, *, record: RunRecord, root: Path
) -> tuple[float, float, float]:
    """Measure, in seconds, the call, the following steps, and the total until the checkpoint is complete."""
    with BackgroundSaver(None, lambda path: None, print) as saver:
        start = time.perf_counter()
        save_state(state, config, record, root=root, saver=saver)
        stall = time.perf_counter() - start
        both = steps(state, batch)
        saver.wait()
        return stall, both, time.perf_counter() - start


def hashing(root: Path) -> float:
    """Measure hashing the content of the files from memory, in seconds."""
    total = 0.0
    for path in root.rglob("*.safetensors"):
        data = path.read_bytes()
        start = time.perf_counter()
        xxhash.xxh3_128(data).hexdigest()
        total += time.perf_counter() - start
    return total


if __name__ == "__main__":
    main()
