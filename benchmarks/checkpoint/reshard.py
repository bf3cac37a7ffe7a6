"""Time and memory of repartitioning, against `cp -r` of the same checkpoint on the same disk in the same run.

`sync` is part of what is timed on both sides, and files are dropped from the page cache before each (where the system
lets us: as root). The checkpoint is the 1.5B model with Adam's moments, 19 GB, unless told otherwise.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_tf.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Print a table: the best of some turns, each turn running both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to measure; needs twice the size")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "examples/configs/tokenformer_1.5b.yaml")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, target = args.directory / "source", args.directory / "target"
    if args.make:  # a process of its own: a child's peak memory counts what its parent held when it began
        make_checkpoint(source, args.config, ranks=2, stages=2)
        return
    if not source.exists():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    tool = [
        sys.executable,
        str(REPOSITORY / "tools/reshard_checkpoint.py"),
        "--load",
        str(source),
        "--save",
        str(target),
    ]
    layout = ["--target-tensor-parallel-size", "4"]
    jobs: dict[str, Callable[[], list[str]]] = {
        "cp -r": lambda: ["cp", "-r", str(source), str(target)],
        "tp 2 x pp 2 to tp 4": lambda: [*tool, *layout],
        "the same, growing ffn by half": lambda: [*tool, *layout, "--grow", f"ffn={grown_ffn(args.config)}"],
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.turns):
        for name, command in jobs.items():
            shutil.rmtree(target, ignore_errors=True)
            drop_caches()
            seconds, mib = timed(command())
            print(f"{name}: {seconds:.1f} s, {mib:,.0f} MiB", flush=True)
            best[name] = min(best.get(name, (seconds, mib)), (seconds, mib))
    shutil.rmtree(target, ignore_errors=True)
    interpreter = timed([sys.executable, "-c", "import torch, megatron_tf.training.run.checkpointing"])[1]
    print(f"\n{size:,} bytes; the interpreter with its libraries takes {interpreter:,.0f} MiB")
    print("| job | time | against cp | GB/s written | peak, MiB |\n|---|---|---|---|---|")
    copied = best["cp -r"][0]
    for name, (seconds, mib) in best.items():
        print(f"| {name} | {seconds:.1f} s | {seconds / copied:.2f} | {size / seconds / 1e9:.2f} | {mib:,.0f} |")


def make_checkpoint(root: Path, config_file: Path, ranks: int, stages: int) -> None:
    """A checkpoint of random bytes, as that layout's ranks would write it, with no more memory than a block."""
    import torch

    from megatron_tf.checkpoint.commit import prepare_directory, publish, temporary_directory
    from megatron_tf.checkpoint.interface import rows_per_block
    from megatron_tf.checkpoint.reshard import Target
    from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileWriter
    from megatron_tf.model.parallelize import stage_layers
    from megatron_tf.parallel.sharding import split_rows
    from megatron_tf.tokenformer.parameters import model_parameters
    from megatron_tf.training.run.checkpointing import new_record

    config = load_config(config_file)
    target = Target(ranks, stage_layers(config.model, stages, config.training.seq_length))
    directory = prepare_directory(root, 1000, 0) and temporary_directory(root, 1000)
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
    """One and a half times the feed-forward tokens."""
    return load_config(config_file).model.token_counts("ffn")[0] * 3 // 2


def drop_caches() -> None:
    """Make the next reads come from the disk."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds until all is on the disk, peak resident MiB) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * resource.getpagesize() / 4096 / 1024


if __name__ == "__main__":
    main()
