"""Run one training step of a configuration on many ranks that do not exist, and plan its checkpoint.

The code of a run builds and shards the model, and runs a step of the pipeline schedule, for one rank of every kind: on
process groups that exchange nothing and tensors without values. The result says what each kind of rank holds and
exchanges in a step, its peak memory, and how large the checkpoint is.

Example:
    megatron-tf dry-run examples/configs/tokenformer_175b.yaml --world-size 1024
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.commands.arguments import file_path, make_parser
from megatron_tf.commands.runner import command, import_late, say

if TYPE_CHECKING:
    from megatron_tf.training.dry_run.dry_run import DryRun, KindOfRank

_GIB = 2**30
_GB = 1e9


@command(less_memory="lower --world-size")
def main(arguments: list[str] | None = None) -> int:
    """Print what a run would hold, exchange and save. Returns 0."""
    parser = make_parser("dry-run", __doc__)
    add = parser.add_argument
    add(
        "config",
        type=file_path,
        help="YAML configuration of a run, with overrides --section.key=value; data and tokenizer are not read",
    )
    add("--world-size", type=int, required=True, metavar="RANKS", help="number of ranks")
    add(
        "--disk-rate",
        type=float,
        default=10.0,
        metavar="GB",
        help="gigabytes per second that all ranks together write to the checkpoint's disk",
    )
    add(
        "--phase",
        type=int,
        default=0,
        metavar="N",
        help="use the sequence length and batch size after this many of data.phases",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    options, overrides = parser.parse_known_args(arguments)
    if options.world_size < 1:
        parser.error(f"--world-size is {options.world_size}: it must be 1 or more")
    if not 0 < options.disk_rate < math.inf:
        parser.error(f"--disk-rate is {options.disk_rate}: it must be positive and finite")
    config = _load(options.config, overrides)
    if not 0 <= options.phase <= len(config.data.phases):
        parser.error(f"--phase is {options.phase}, but data.phases has {len(config.data.phases)} entries")
    import_late("megatron_tf.training.dry_run.dry_run")
    from megatron_tf.training.dry_run.dry_run import dry_run

    def on_stage(stage: int, stages: int) -> None:
        say(f"pipeline stage {stage} of {stages}")

    result = dry_run(config, options.world_size, on_stage, phase=options.phase)
    seconds = result.checkpoint.bytes / (options.disk_rate * _GB)
    if options.json:
        print(json.dumps(to_json(result, seconds), indent=1))
    else:
        print("\n".join(report(result, seconds)))
    return 0


def _load(path: Path, overrides: list[str]) -> Any:
    from megatron_tf.config import load_config

    return load_config(path, overrides)


def to_json(result: "DryRun", seconds: float) -> dict[str, Any]:
    """Convert a result to JSON values; `seconds` is the time to write the checkpoint."""
    values = dataclasses.asdict(result)
    checkpoint = result.checkpoint
    values["checkpoint"] |= {
        "files": len(checkpoint.files),
        "bytes": checkpoint.bytes,
        "largest_file_bytes": max(checkpoint.files.values()),
        "seconds": seconds,
    }
    return values


def report(result: "DryRun", seconds: float) -> list[str]:
    """Return the lines of the tables; `seconds` is the time to write the checkpoint."""
    layout, checkpoint = result.layout, result.checkpoint
    lines = [
        f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
        f"{f' x context {layout.context}' if layout.context > 1 else ''}, parameters sharded over "
        f"{layout.shard_size * layout.context}; micro-batches of a step: {result.micro_batches}",
        "",
        "stage    layers  ranks     parameters params GiB  Adam GiB  peak GiB",
    ]
    lines += [_describe(kind) for kind in result.kinds]
    lines += ["", "messages of a step; stages that exchange the same are listed together"]
    lines += ["stage axis         kind                calls           GB"]
    for traffic, kinds in itertools.groupby(result.kinds, key=lambda kind: kind.traffic):
        stages = sorted({kind.stage for kind in kinds})
        label = str(stages[0]) if len(stages) == 1 else f"{stages[0]}-{stages[-1]}"
        for each in traffic:
            lines.append(f"{label:>5} {each.axis:<12} {each.kind:<15} {each.calls:>9,} {each.bytes / _GB:>12.6f}")
    lines += [
        "",
        f"checkpoint: {len(checkpoint.files):,} files, {checkpoint.bytes / _GB:,.1f} GB, written in {seconds:,.0f} s; "
        f"the largest file has {max(checkpoint.files.values()) / _GB:.3f} GB",
        f"manifest: {checkpoint.pieces:,} pieces, {checkpoint.manifest_bytes / 1e6:,.1f} MB",
    ]
    return lines


def _describe(kind: "KindOfRank") -> str:
    layers = ",".join(f"{first}-{stop - 1}" for first, stop in kind.layers)
    return (
        f"{kind.stage:>5} {layers:>9} {kind.count:>6} {kind.parameters:>14,} {kind.parameter_bytes / _GIB:>10.3f} "
        f"{kind.optimizer_bytes / _GIB:>9.3f} {kind.peak_bytes / _GIB:>9.3f}"
    )
