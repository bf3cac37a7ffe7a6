"""Grow a checkpoint and repartition it for other parallel degrees, without a GPU."""

import argparse
import os
import sys
from pathlib import Path

import torch

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import GrowthPlan, plan_growth, token_kind
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import Target, plan_files, reshard
from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.inference.model import load_model
from megatron_tf.model.parallelize import is_replicated, stage_layers
from megatron_tf.model.sizes import training_flops

EXACT = 1e-5  # largest difference of logits that rounding explains, relative to the largest logit
COMPARED_TOKENS = 64
MEMORY_SHARE = 0.8  # of what is free, for the two models that are compared


def main(arguments: list[str] | None = None) -> int:
    """0 when the new checkpoint is complete (and verified, if asked), 1 after an error."""
    args = parse_arguments(arguments)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; names follow Megatron-LM's tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True, help="checkpoint, or a run's directory of them")
    parser.add_argument("--save", type=Path, required=True, help="directory for the new checkpoint")
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--target-pipeline-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--grow", metavar="qkv=N,proj=N,ffn=N", help="new number of parameter tokens by kind")
    parser.add_argument("--growth-init", choices=["zero_key"], default="zero_key", help="zero_key changes no output")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it with the source")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.save.resolve() == args.load.resolve():
        raise CheckpointError("--save is the same directory as --load: choose another")
    source = CheckpointReader(args.load)
    source.verify()
    growth = plan_growth(source.metadata, args.grow) if args.grow else None
    target = make_target(source, args.target_tensor_parallel_size, args.target_pipeline_parallel_size)
    describe(source, target, growth)
    if args.dry_run:
        return 0
    path = reshard(source, args.save, target, growth, sys.stderr.isatty())
    print(f"wrote {path}")
    result = CheckpointReader(path)
    if args.verify:
        compare_tensors(source, result)
        print("verified: every checksum holds, and every old row is the same, bit for bit")
    needed, available = model_bytes(source) + model_bytes(result), available_memory()
    if needed > MEMORY_SHARE * available:
        print(f"the logits are not compared: both models take {needed:,} bytes, {available:,} bytes of memory are free")
        return 0
    difference, largest = compare_logits(source.directory, path)
    print(f"max |delta logit| before and after: {difference:.3g} (largest |logit| {largest:.3g})")
    if difference > EXACT * largest:
        raise CheckpointError(f"{path}: the logits moved by {difference:.3g}, more than rounding explains")
    return 0


def make_target(source: CheckpointReader, tensor_parallel: int, pipeline_parallel: int) -> Target:
    """The target layout, with layers balanced over stages as the trainer does."""
    config = parse_config(ModelConfig, source.metadata["model"], str(source.directory))
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise CheckpointError("the target's parallel sizes must be 1 or more")
    if config.num_attention_heads % tensor_parallel:
        raise CheckpointError(
            f"{config.num_attention_heads} attention heads cannot be shared equally by "
            f"{tensor_parallel} tensor-parallel ranks"
        )
    stages = stage_layers(config, pipeline_parallel, source.metadata["config"]["training"]["seq_length"])

    def stage_of(name: str) -> int:
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            return next(stage for stage, layers in enumerate(stages) if layer in layers)
        return 0 if name.startswith("embedding.") else pipeline_parallel - 1

    return Target(tensor_parallel, pipeline_parallel, stage_of, is_replicated)


def describe(source: CheckpointReader, target: Target, growth: GrowthPlan | None) -> None:
    """Print what goes in and what comes out."""
    changes: dict[str, tuple[int, int]] = {}
    for name in source.names("model"):
        rows, columns = source.shape("model", name)[0], torch.Size(source.shape("model", name)[1:]).numel()
        grown = rows if growth is None else growth.rows(name, rows)
        kind = token_kind(name) or name.split(".")[0]
        old, new = changes.get(kind, (0, 0))
        changes[kind] = old + rows * columns, new + grown * columns
    plans = list(plan_files(source, target, growth))
    size = sum(spec.nbytes for _, _, specs in plans for spec in specs)
    print(f"{source.directory}, step {source.step:,}")
    print(f"  {'parameters':<12}{'before':>16}{'after':>16}")
    total = (sum(old for old, _ in changes.values()), sum(new for _, new in changes.values()))
    for kind, (old, new) in [*changes.items(), ("total", total)]:
        print(f"  {kind:<12}{old:>16,}{new:>16,}")
    config, seq_length = source.metadata["model"], source.metadata["config"]["training"]["seq_length"]
    grown_config = config if growth is None else growth.grown_metadata(source.metadata)["model"]
    flops = (training_flops(parse_config(ModelConfig, c, "model"), seq_length) for c in (config, grown_config))
    print("  {:<12}{:>16,}{:>16,}".format("FLOPs/token", *flops))
    print(
        f"  to tensor {target.tensor_parallel} x pipeline {target.pipeline_parallel}: "
        f"{len(plans)} files, {size:,} bytes",
        flush=True,
    )


def model_bytes(checkpoint: CheckpointReader) -> int:
    """What its parameters take in memory."""
    sizes = (torch.Size(checkpoint.shape("model", name)).numel() for name in checkpoint.names("model"))
    return 4 * sum(sizes)  # loaded as fp32


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS tells what there is, not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


@torch.no_grad()
def compare_logits(before: Path, after: Path) -> tuple[float, float]:
    """(largest difference of the logits on fixed tokens, largest logit) of two checkpoints."""
    old, new = load_model(before), load_model(after)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(old.config.vocab_size, (2, COMPARED_TOKENS), generator=generator)
    old_logits, new_logits = old(ids), new(ids)
    return float((old_logits - new_logits).abs().max()), float(old_logits.abs().max())


def compare_tensors(source: CheckpointReader, result: CheckpointReader) -> None:
    """Raise CheckpointError unless the result is sound and its old rows are the source's."""
    result.verify()
    for group in source.groups():
        for name in source.names(group):
            rows = source.shape(group, name)[0]
            blocks = zip(
                source.read_blocks(group, name, 0, rows), result.read_blocks(group, name, 0, rows), strict=True
            )
            if not all(torch.equal(old, new) for old, new in blocks):
                raise CheckpointError(f"{result.directory}: {group} {name} differs from the source")


if __name__ == "__main__":
    sys.exit(main())
