"""Repartition a checkpoint for other parallel degrees, grow it or shrink it, offline and without a GPU.

The new checkpoint appears under --save when it is complete; whatever goes wrong before leaves nothing there. A run goes
on from it with checkpoint.load, or, if it is copied there, checkpoint.save. Tensors are streamed in blocks: checkpoints
may be larger than the memory.
"""

import argparse
import math
import resource
import sys
from pathlib import Path
from typing import Any

from megatron_tf.interrupt import end_at_interrupt, run_command

if __name__ == "__main__":
    end_at_interrupt()  # the imports below take seconds

import yaml

from megatron_tf.arguments import file_path
from megatron_tf.checkpoint.derived import BLOCK_BYTES, Checkpoint, DerivedCheckpoint, read_blocks
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import grow
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import MEMORY_BLOCKS, Target, plan_files, progress_bar, reshard
from megatron_tf.checkpoint.shrink import keep_most_important, shrink
from megatron_tf.checkpoint.summary import common_shape, differing_values, names_by_pattern
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.config import GrowthStage, parse_config, parse_token_option
from megatron_tf.inference.calibration import (
    Comparison,
    available_memory,
    compare_models,
    read_samples,
    token_importance,
)
from megatron_tf.inference.model import load_model
from megatron_tf.inference.tokenizer import check_made_with
from megatron_tf.model.parallelize import stage_layers
from megatron_tf.tokenformer.sizes import training_flops

EXACT = 1e-5  # largest difference of logits that rounding explains, relative to the largest logit
EXIT_ERROR, EXIT_NOT_VERIFIED = 1, 3


class VerificationError(ValueError):
    """The new checkpoint is there and is not what it should be."""


def main(arguments: list[str] | None = None) -> int:
    """0 when the new checkpoint is complete (and verified, if asked); 1 after an error, with nothing written; 3 where
    the new checkpoint was written and --verify finds fault with it."""
    args = parse_arguments(arguments)
    try:
        run(args)
    except VerificationError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_NOT_VERIFIED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; names follow Megatron-LM's tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit code: 0 done, 1 error and nothing written, 2 usage, 3 written but --verify finds a fault.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", type=file_path, required=True, help="checkpoint, or a run's directory of them")
    parser.add_argument("--save", type=file_path, required=True, help="directory for the new checkpoint")
    parser.add_argument(
        "--allow-existing",
        action="store_true",
        help="write next to the checkpoints that --save holds already, and replace the one of the same step",
    )
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1, metavar="T")
    parser.add_argument("--target-pipeline-parallel-size", type=int, default=1, metavar="P")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, metavar="M", help="pad the vocabulary anew")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything back, compare it bit for bit, and compare the logits of both models where they fit",
    )
    parser.add_argument("--data", type=file_path, metavar="PREFIX", help=".bin/.idx to measure loss and importance on")
    parser.add_argument("--data-tokens", type=int, default=16384, metavar="N", help="how much of it (%(default)s)")
    growth = parser.add_argument_group("growth", "what is not given keeps the default of a `growth:` stage in a config")
    growth.add_argument("--stage", type=file_path, metavar="FILE", help="YAML file with the keys of a stage")
    growth.add_argument(
        "--grow", metavar="qkv=N,proj=N,ffn@0-5=N", help="new number of tokens by kind, or also by layer"
    )
    growth.add_argument("--growth-init", choices=["zero_key", "duplicate", "random"], help="default: zero_key, exact")
    growth.add_argument("--growth-noise", type=float, metavar="X", help="noise on the values of duplicates (0.1)")
    growth.add_argument("--insert-layers", metavar="I,J,...", help="a new layer before each old one named")
    growth.add_argument("--moments", choices=["keep", "reset"], help="Adam's moments of what was there (keep)")
    growth.add_argument("--old-tokens-lr-scale", type=float, metavar="X", help="of old tokens; 0 freezes them (1)")
    growth.add_argument("--rewarmup-iters", type=int, metavar="N", help="steps of warm-up after the growth (0)")
    parser.add_argument("--shrink", metavar="qkv=N,proj=N,ffn=N", help="keep the N tokens that do most on --data")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Do it."""
    if args.save.resolve() == args.load.resolve():
        raise CheckpointError("--save is the same directory as --load: choose another")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a file for each rank and group is open
    source = CheckpointReader(args.load, check_at_end=True).complete()
    result, is_exact = derive(source, args)
    target = make_target(result, args.target_tensor_parallel_size, args.target_pipeline_parallel_size)
    describe(source, result, target)
    if args.dry_run:
        return
    if args.data is not None:
        check_made_with(args.data, source.record.tokenizer)
    path = reshard(result, args.save, target, source.verify, sys.stderr.isatty(), allow_existing=args.allow_existing)
    print(f"wrote {path}", flush=True)
    if args.verify:
        compare_tensors(result, path)
        source.verify()
        print("verified: every checksum holds, and every row is what it should be, bit for bit", flush=True)
    if args.verify or args.data:
        report(source.directory, path, args, is_exact)


def derive(source: CheckpointReader, args: argparse.Namespace) -> tuple[Checkpoint, bool]:
    """(the checkpoint to write, whether it computes the same)."""
    result: Checkpoint = source
    stage = growth_stage(args)
    if args.shrink is not None and stage:
        raise CheckpointError("--shrink and growth are two steps: run the tool twice")
    if args.shrink is not None:
        result = shrunk(source, args)
    if stage:
        result = grow(source, stage)
    if args.make_vocab_size_divisible_by is not None:
        if args.make_vocab_size_divisible_by < 1:
            raise CheckpointError(
                f"--make-vocab-size-divisible-by is {args.make_vocab_size_divisible_by}: it must be 1 or more"
            )
        result = pad_vocabulary(result, args.make_vocab_size_divisible_by)
    return result, args.shrink is None and (stage is None or stage.init != "random")


def growth_stage(args: argparse.Namespace) -> GrowthStage | None:
    """From --stage and the options beside it; None for no growth."""
    values: dict[str, Any] = {}
    if args.stage:
        try:
            values = yaml.safe_load(args.stage.read_text())
        except yaml.YAMLError as error:
            raise CheckpointError(f"{args.stage}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{args.stage}: expected the keys of a stage, found {type(values).__name__}")
    if args.grow is not None:
        values |= {f"{kind}_tokens": counts for kind, counts in parse_token_option("--grow", args.grow).items()}
    if args.insert_layers is not None:
        layers = args.insert_layers.split(",")
        if not all(layer.strip().isdecimal() for layer in layers):
            raise CheckpointError(f"--insert-layers {args.insert_layers!r}: write numbers of layers, such as 0,6,6")
        values["insert_layers"] = [int(layer) for layer in layers]
    options = {
        "init": args.growth_init,
        "noise": args.growth_noise,
        "moments": args.moments,
        "old_tokens_lr_scale": args.old_tokens_lr_scale,
        "rewarmup_iters": args.rewarmup_iters,
    }
    values |= {key: value for key, value in options.items() if value is not None}
    return parse_config(GrowthStage, values, str(args.stage or "growth")) if values else None


def shrunk(source: CheckpointReader, args: argparse.Namespace) -> DerivedCheckpoint:
    """The source without the tokens that do least on the data."""
    if args.data is None:
        raise CheckpointError("--shrink needs --data PREFIX: the tokens that do least on it are dropped")
    tokens = parse_token_option("--shrink", args.shrink)
    if by_layer := [kind for kind, count in tokens.items() if not isinstance(count, int)]:
        raise CheckpointError(f"--shrink {by_layer[0]}: layers shrink alike, write {by_layer[0]}=N")
    model = load_model(source.directory)
    check_made_with(args.data, source.record.tokenizer)
    samples = read_samples(args.data, model.config.vocab_size, source.record.seq_length, args.data_tokens)
    importance = token_importance(model, samples)
    return shrink(source, keep_most_important(model.config, importance, tokens))  # type: ignore[arg-type]


def make_target(checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int) -> Target:
    """The target layout, with layers balanced over stages as the trainer does."""
    config = checkpoint.record.model
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise CheckpointError("the target's parallel sizes must be 1 or more")
    if config.num_attention_heads % tensor_parallel:
        raise CheckpointError(
            f"{config.num_attention_heads} attention heads cannot be shared equally by "
            f"{tensor_parallel} tensor-parallel ranks"
        )
    return Target(tensor_parallel, stage_layers(config, pipeline_parallel, checkpoint.record.seq_length))


def describe(source: CheckpointReader, result: Checkpoint, target: Target) -> None:
    """Print what goes in and what comes out."""
    plans = list(plan_files(result, target))
    print(f"{source.directory}, step {source.step:,}")
    print(f"  {'parameters':<36}{'shape before':>20}{'after':>20}{'before':>16}{'after':>16}")
    names_before, names_after = names_by_pattern(source, "model"), names_by_pattern(result, "model")
    for pattern, names in names_before.items():
        old_shape, old = _size_of(source, names)
        new_shape, new = _size_of(result, names_after[pattern])
        print(f"  {pattern:<36}{old_shape:>20}{new_shape:>20}{old:>16,}{new:>16,}")
    both = (source, result)
    rows = {
        "all parameters": [_parameters(checkpoint) for checkpoint in both],
        "layers": [checkpoint.record.model.num_layers for checkpoint in both],
        "FLOPs per token in training": [_flops(checkpoint) for checkpoint in both],
        "files": [len(source.manifest.files) - 1, len(plans)],
        "bytes": [sum(file.bytes for file in source.manifest.files.values()), sum(plan.nbytes for plan in plans)],
    }
    for name, (before, after) in rows.items():
        print(f"  {name:<76}{before:>16,}{after:>16,}")
    largest_row = max(spec.row_bytes for plan in plans for spec in plan.specs)
    print(
        f"  to tensor {target.tensor_parallel} x pipeline {len(target.stages)}; memory beyond the interpreter's: "
        f"at most {MEMORY_BLOCKS * max(BLOCK_BYTES, largest_row):,} bytes",
        flush=True,
    )


def _size_of(checkpoint: Checkpoint, names: list[str]) -> tuple[str, int]:
    """(shapes, parameters) of the tensors that differ in their layer only."""
    shapes = [checkpoint.shape("model", name) for name in names]
    shape = common_shape(shapes)
    return f"{len(shapes)} of {shape}" if len(shapes) > 1 else shape, sum(map(math.prod, shapes))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape("model", name)) for name in checkpoint.names("model"))


def _flops(checkpoint: Checkpoint) -> int:
    return training_flops(checkpoint.record.model, checkpoint.record.seq_length)


def compare_tensors(expected: Checkpoint, path: Path) -> None:
    """Raise VerificationError unless the checkpoint at `path` is sound and holds what was `expected`."""
    found = CheckpointReader(path, check_at_end=True)
    tensors = [(group, name) for group in expected.groups() for name in expected.names(group)]
    total = sum(math.prod(expected.shape(*tensor)) * expected.dtype(*tensor).itemsize for tensor in tensors)
    with progress_bar("verifying", total, sys.stderr.isatty()) as bar:
        for group, name in tensors:
            rows = expected.shape(group, name)[0]
            sides = (read_blocks(checkpoint, group, name, 0, rows) for checkpoint in (expected, found))
            for wanted, have in zip(*sides, strict=True):
                if differing_values(wanted, have):  # by their bytes: a NaN equals the same NaN
                    raise VerificationError(f"{path}: {group} {name} is not what it should be")
                bar.update(have.nbytes)
    if found.record != expected.record:
        raise VerificationError(f"{path}: its metadata is not what it should be")
    try:
        found.verify()
    except CheckpointError as error:
        raise VerificationError(str(error)) from error


def report(before: Path, after: Path, args: argparse.Namespace, is_exact: bool) -> None:
    """Print how the outputs of both models differ. Raises VerificationError where they should not."""
    readers = [CheckpointReader(path) for path in (before, after)]
    needed, available = max(4 * _parameters(reader) for reader in readers), available_memory()
    if needed > available:
        print(f"the logits are not compared: a model takes {needed:,} bytes, {available:,} bytes of memory are free")
        return
    samples = None
    if args.data:
        vocab_size = readers[0].record.model.vocab_size
        check_made_with(args.data, readers[0].record.tokenizer)
        samples = read_samples(args.data, vocab_size, readers[0].record.seq_length, args.data_tokens)
    found: Comparison = compare_models(before, after, samples)
    print(f"max |delta logit| before and after: {found.difference:.3g} (largest |logit| {found.largest:.3g})")
    if found.losses:
        old, new = found.losses
        print(f"loss on {args.data}: {old:.6f} before, {new:.6f} after ({new - old:+.2g})")
    if found.became_non_finite:
        raise VerificationError(
            f"{after}: {found.became_non_finite:,} logits became infinite or NaN: the new checkpoint cannot be used"
        )
    if not is_exact:
        print("this change does not keep the model's outputs, as said in --help")
    elif not found.difference <= EXACT * found.largest:  # a NaN is neither
        raise VerificationError(f"{after}: the logits moved by {found.difference:.3g}, more than rounding explains")


if __name__ == "__main__":
    sys.exit(run_command(main))
