"""Time and memory of resharding and growing, against `cp -r` of what was written, on the same disk in the same run.

Both times include `sync`, and files are dropped from the page cache before each (if permitted: as root). By default the
checkpoint is that of the 1.5B model with Adam moments, 19 GB.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tf.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
COPIES = ("--layer-order", "stacked", "--layer-init", "copy")


def main() -> None:
    """Print a table of the best of several turns, each of which runs both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, required=True, help="on the disk to measure; needs up to five times the size"
    )
    parser.add_argument("--config", type=Path, default=REPOSITORY / "examples/configs/tokenformer_1.5b.yaml")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", metavar="TEXT", help="jobs whose name contains this, such as width")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, target = args.directory / "source", args.directory / "target"
    if args.make:  # a separate process: a child's peak memory includes what its parent held at the fork
        make_checkpoint(source, args.config, ranks=2, stages=2)
        return
    if not source.exists():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    tool = [
        sys.executable,
        str(REPOSITORY / "tools/reshard_checkpoint.py"),
        "--load",
        str(source),
        "--save",
        str(target),
    ]
    layout = ["--target-tensor-parallel-size", "4"]
    jobs = {
        "tp 2 x pp 2 to tp 4": [],
        "the same, growing ffn by half": ["--grow", f"ffn={grown_ffn(args.config)}"],
        "the same, with twice the layers by copies": ["--num-layers", twice_the_layers(args.config), *COPIES],
        "the same, with twice the width": ["--hidden-multiple", "2"],
    }
    chosen = {name: options for name, options in jobs.items() if not args.only or args.only in name}
    best = {name: best_of(args.turns, [*tool, *layout, *options], target) for name, options in chosen.items()}
    interpreter = timed([sys.executable, "-c", "import torch, megatron_tf.training.run.checkpointing"])[1]
    print(f"\nthe interpreter with its libraries takes {interpreter:,.0f} MiB")
    print("| job | time | bytes | against cp | GB/s written | peak, MiB |\n|---|---|---|---|---|---|")
    for name, measured in best.items():
        rate = measured.size / measured.seconds / 1e9
        print(
            f"| {name} | {measured.seconds:.1f} s | {measured.size:,} | {measured.seconds / measured.copied:.2f} | "
            f"{rate:.2f} | {measured.peak:,.0f} |"
        )


@dataclass
class Measured:
    """The best of several turns of a job."""

    seconds: float = math.inf
    peak: float = math.inf
    """MiB of memory."""
    copied: float = math.inf
    """Seconds that `cp` takes for what the job writes."""
    size: int = 0
    """Bytes of what it writes."""


def best_of(turns: int, command: list[str], target: Path) -> Measured:
    """Run a job that writes `target`, and cp of what it wrote, alternately."""
    copy = target.with_name("copy")
    best = Measured()
    for _ in range(turns):
        for path in (target, copy):
            shutil.rmtree(path, ignore_errors=True)
        drop_caches()
        seconds, peak = timed(command)
        drop_caches()
        copied, _ = timed(["cp", "-r", str(target), str(copy)])
        print(f"{' '.join(command[5:])}: {seconds:.1f} s, {peak:,.0f} MiB; cp {copied:.1f} s", flush=True)
        best.seconds, best.peak = min(best.seconds, seconds), min(best.peak, peak)
        best.copied = min(best.copied, copied)
        best.size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    for path in (target, copy):
        shutil.rmtree(path, ignore_errors=True)
    return best


def twice_the_layers(config_file: Path) -> str:
    """Return twice the number of layers."""
    return str(2 * load_config(config_file).model.num_layers)


def make_checkpoint(root: Path, config_file: Path, ranks: int, stages: int) -> None:
    """Write a checkpoint of random bytes as the ranks of a layout would, block by block."""
    import torch

    from megatron_tf.checkpoint.commit import prepare_directory, publish
    from megatron_tf.checkpoint.interface import rows_per_block
    from megatron_tf.checkpoint.reshard import Target
    from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileWriter
    from megatron_tf.model.parallelize import stage_layers
    from megatron_tf.parallel.sharding import split_rows
    from megatron_tf.tokenformer.parameters import model_parameters
    from megatron_tf.training.run.checkpointing import new_record

    config = load_config(config_file)
    target = Target(ranks, stage_layers(config.model, stages, config.training.seq_length))
    directory = prepare_directory(root, 1000, 0)
    written = []
    for group in ("model", "exp_avg", "exp_avg_sq"):
        for stage in range(stages):
            for rank in range(ranks):
                specs = [
                    PieceSpec(p.name, torch.float32, p.shape, *split_rows(p.shape[0], target.num_parts(p), rank))
                    for p in model_parameters(config.model).values()
                    if rank < target.num_parts(p) and target.stage_of(p) == stage
                ]
                with ShardFileWriter(directory / f"{group}-pp{stage:02d}-tp{rank:02d}-dp00.safetensors", specs) as file:
                    for spec in specs:
                        step = rows_per_block(spec.shape, spec.dtype)
                        for start in range(spec.start, spec.stop, step):
                            file.write(torch.randn(min(step, spec.stop - start), *spec.shape[1:]))
                written.append(file.written(group))
    record = new_record(config, {})
    training = replace(record.training, step=1000, adam_steps=1000)
    publish(root, 1000, record=replace(record, training=training), written=written)


def grown_ffn(config_file: Path) -> int:
    """Return 1.5 times the number of feed-forward tokens."""
    return load_config(config_file).model.token_counts("ffn")[0] * 3 // 2


def drop_caches() -> None:
    """Drop the page cache, so that the next reads come from the disk."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def timed(command: list[str]) -> tuple[float, float]:
    """Run a process; return the seconds until everything is on the disk, and the peak resident MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
