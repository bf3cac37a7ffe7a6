"""What `reshard_checkpoint` does once it has read its options."""

import math
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.growth import grow
from megatron_tf.checkpoint.interface import BLOCK_BYTES, Checkpoint
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import MEMORY_BLOCKS, FilePlan, Target, plan_files, reshard
from megatron_tf.checkpoint.shrink import keep_most_important, shrink
from megatron_tf.checkpoint.summary import common_shape, differences, names_by_pattern
from megatron_tf.checkpoint.transformed import TransformedCheckpoint
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.commands.arguments import read_text
from megatron_tf.commands.progress import byte_bar
from megatron_tf.commands.reshard_checkpoint import Options
from megatron_tf.config import GrowthStage, parse_config, parse_token_option
from megatron_tf.config.load import read_yaml
from megatron_tf.errors import UserError
from megatron_tf.inference.comparison import compare_models
from megatron_tf.inference.importance import token_importance
from megatron_tf.inference.model import load_model
from megatron_tf.inference.samples import samples_for
from megatron_tf.inference.tokenizer import check_made_with
from megatron_tf.model.parallelize import stage_layers
from megatron_tf.tokenformer.sizes import training_flops

EXACT = 1e-5  # largest difference of logits that rounding explains, relative to the largest logit


class VerificationError(UserError):
    """The new checkpoint is there and is not what it should be."""

    exit_code = 3


def run(options: Options) -> None:
    """Reshard, grow or shrink. Raises UserError for what a user can fix."""
    if options.save.resolve() == options.load.resolve():
        raise CheckpointError("--save is the same directory as --load: choose another")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a file for each rank and group is open
    source = CheckpointReader(options.load, check_at_end=True).complete()
    result, is_exact = transform(source, options)
    target = make_target(result, options.target_tensor_parallel_size, options.target_pipeline_parallel_size)
    plans = list(plan_files(result, target))
    print_plan(source, result, target=target, plans=plans)
    if options.dry_run:
        return
    if options.data is not None:
        check_made_with(options.data, source.record.tokenizer)
    total = sum(plan.nbytes for plan in plans)
    with byte_bar("writing", total) as bar:
        path = reshard(
            result,
            options.save,
            target,
            check_source=source.verify,
            progress=bar.update,
            allow_existing=options.allow_existing,
        )
    print(f"wrote {path}", flush=True)
    if options.verify:
        with byte_bar("verifying", total) as bar:
            check_tensors(result, path, bar.update)
        source.verify()
        print("verified: every checksum holds, and every row is what it should be, bit for bit", flush=True)
    if options.verify or options.data:
        compare_outputs(source.directory, path, options, is_exact=is_exact)


def transform(source: CheckpointReader, options: Options) -> tuple[Checkpoint, bool]:
    """Return the checkpoint to write, and whether its model computes the same."""
    result: Checkpoint = source
    stage = growth_stage(options)
    if options.shrink is not None and stage:
        raise CheckpointError("--shrink and growth are two steps: run the tool twice")
    if options.shrink is not None:
        result = shrunk(source, options)
    if stage:
        result = grow(source, stage)
    if options.make_vocab_size_divisible_by is not None:
        if options.make_vocab_size_divisible_by < 1:
            raise CheckpointError(
                f"--make-vocab-size-divisible-by is {options.make_vocab_size_divisible_by}: it must be 1 or more"
            )
        result = pad_vocabulary(result, options.make_vocab_size_divisible_by)
    return result, options.shrink is None and (stage is None or stage.init != "random")


def growth_stage(options: Options) -> GrowthStage | None:
    """Make the growth stage of --stage and of the options that override its keys; None for no growth."""
    values: dict[str, Any] = {}
    if options.stage:
        try:
            values = read_yaml(read_text(options.stage))
        except yaml.YAMLError as error:
            raise CheckpointError(f"{options.stage}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{options.stage}: expected the keys of a stage, found {type(values).__name__}")
    if options.grow is not None:
        values |= {f"{kind}_tokens": counts for kind, counts in parse_token_option("--grow", options.grow).items()}
    if options.insert_layers is not None:
        layers = options.insert_layers.split(",")
        if not all(layer.strip().isdecimal() for layer in layers):
            raise CheckpointError(f"--insert-layers {options.insert_layers!r}: write numbers of layers, such as 0,6,6")
        values["insert_layers"] = [int(layer) for layer in layers]
    others = {
        "init": options.growth_init,
        "noise": options.growth_noise,
        "moments": options.moments,
        "old_tokens_lr_scale": options.old_tokens_lr_scale,
        "rewarmup_iters": options.rewarmup_iters,
    }
    values |= {key: value for key, value in others.items() if value is not None}
    return parse_config(GrowthStage, values, str(options.stage or "growth")) if values else None


def shrunk(source: CheckpointReader, options: Options) -> TransformedCheckpoint:
    """Drop the tokens that contribute least on the data."""
    if options.data is None:
        raise CheckpointError("--shrink needs --data PREFIX: the tokens that contribute least on it are dropped")
    assert options.shrink is not None  # `transform` has looked
    tokens = parse_token_option("--shrink", options.shrink)
    if by_layer := [kind for kind, count in tokens.items() if not isinstance(count, int)]:
        raise CheckpointError(f"--shrink {by_layer[0]}: layers shrink alike, write {by_layer[0]}=N")
    model = load_model(source.directory)
    samples = samples_for(source.record, options.data, options.data_tokens)
    importance = token_importance(model, samples)
    return shrink(source, keep_most_important(model.config, importance, tokens))  # type: ignore[arg-type]


def make_target(checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int) -> Target:
    """Make the target layout, with layers balanced over stages as the trainer does."""
    config = checkpoint.record.model
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise CheckpointError("the target's parallel sizes must be 1 or more")
    if config.num_attention_heads % tensor_parallel:
        raise CheckpointError(
            f"{config.num_attention_heads} attention heads cannot be shared equally by "
            f"{tensor_parallel} tensor-parallel ranks"
        )
    return Target(tensor_parallel, stage_layers(config, pipeline_parallel, checkpoint.record.seq_length))


def print_plan(source: CheckpointReader, result: Checkpoint, *, target: Target, plans: Sequence[FilePlan]) -> None:
    """Print what goes in and what comes out."""
    print(f"{source.directory}, step {source.step:,}")
    print(f"  {'parameters':<36}{'shape before':>20}{'after':>20}{'before':>16}{'after':>16}")
    names_before, names_after = names_by_pattern(source, "model"), names_by_pattern(result, "model")
    for pattern, names in names_before.items():
        old_shape, old = _size_of(source, names)
        new_shape, new = _size_of(result, names_after[pattern])
        print(f"  {pattern:<36}{old_shape:>20}{new_shape:>20}{old:>16,}{new:>16,}")
    files = source.manifest.files
    rows = [
        ("all parameters", _parameters(source), _parameters(result)),
        ("layers", source.record.model.num_layers, result.record.model.num_layers),
        ("FLOPs per token in training", _flops(source), _flops(result)),
        ("files", len(files) - 1, len(plans)),
        ("bytes", sum(file.bytes for file in files.values()), sum(plan.nbytes for plan in plans)),
    ]
    for name, before, after in rows:
        print(f"  {name:<76}{before:>16,}{after:>16,}")
    largest_row = max(max(spec.row_bytes for spec in plan.specs) for plan in plans)
    print(
        f"  to tensor {target.tensor_parallel} x pipeline {len(target.stages)}; memory beyond the interpreter's: "
        f"at most {MEMORY_BLOCKS * max(BLOCK_BYTES, largest_row):,} bytes",
        flush=True,
    )


def _size_of(checkpoint: Checkpoint, names: list[str]) -> tuple[str, int]:
    """Return the shapes and the parameters of tensors that differ in their layer only."""
    shapes = [checkpoint.shape("model", name) for name in names]
    shape = common_shape(shapes)
    return f"{len(shapes)} of {shape}" if len(shapes) > 1 else shape, sum(map(math.prod, shapes))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape("model", name)) for name in checkpoint.names("model"))


def _flops(checkpoint: Checkpoint) -> int:
    return training_flops(checkpoint.record.model, checkpoint.record.seq_length)


def check_tensors(expected: Checkpoint, path: Path, progress: Callable[[int], object]) -> None:
    """Raise VerificationError unless the checkpoint at `path` is sound and holds what was `expected`, bit for bit."""
    found = CheckpointReader(path, check_at_end=True)
    for difference in differences(expected, found, progress):
        raise VerificationError(f"{path} is not what it should be: {difference}")
    if found.record != expected.record:
        raise VerificationError(f"{path}: its metadata is not what it should be")
    try:
        found.verify()
    except CheckpointError as error:
        raise VerificationError(str(error)) from error


def compare_outputs(before: Path, after: Path, options: Options, *, is_exact: bool) -> None:
    """Print how the outputs of both models differ. Raises VerificationError where they should not."""
    readers = [CheckpointReader(path) for path in (before, after)]
    needed = max(4 * _parameters(reader) for reader in readers)
    available = available_memory()
    if needed > available:
        print(f"the logits are not compared: a model takes {needed:,} bytes, {available:,} bytes of memory are free")
        return
    samples = None
    if options.data:
        samples = samples_for(readers[0].record, options.data, options.data_tokens)
    found = compare_models(before, after, samples)
    print(f"max |delta logit| before and after: {found.difference:.3g} (largest |logit| {found.largest:.3g})")
    if found.losses:
        old, new = found.losses
        print(f"loss on {options.data}: {old:.6f} before, {new:.6f} after ({new - old:+.2g})")
    if found.became_non_finite:
        raise VerificationError(
            f"{after}: {found.became_non_finite:,} logits became infinite or NaN: the new checkpoint cannot be used"
        )
    if not is_exact:
        print("this change does not keep the model's outputs, as said in --help")
    elif not found.difference <= EXACT * found.largest:  # a NaN is neither
        raise VerificationError(f"{after}: the logits moved by {found.difference:.3g}, more than rounding explains")


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS shows the total, not what is free: half of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(0.8 * 1024 * int(fields["MemAvailable"].split()[0]))
