"""Implementation of `reshard-checkpoint`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import stored_dtype
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import BLOCK_BYTES, Checkpoint
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import MEMORY_BLOCKS, FilePlan, Target, plan_files, reshard
from megatron_tf.checkpoint.summary import common_shape, differences, names_by_pattern
from megatron_tf.checkpoint.transformed import TransformedCheckpoint
from megatron_tf.checkpoint.vocabulary import pad_vocabulary
from megatron_tf.commands.progress import byte_bar
from megatron_tf.commands.reshard_checkpoint import Options
from megatron_tf.config import GrowthStage, keeps_outputs, parse_config, parse_token_option
from megatron_tf.config.load import read_mapping
from megatron_tf.errors import UserError
from megatron_tf.growth.advice import advise
from megatron_tf.growth.divide_width import divide_width
from megatron_tf.growth.drop_layers import drop_layers
from megatron_tf.growth.grow import grow
from megatron_tf.growth.shrink import keep_most_important, shrink
from megatron_tf.growth.utility import measure_utility, needs_utility
from megatron_tf.host import allow_more_files, usable_memory
from megatron_tf.inference.comparison import compare_models
from megatron_tf.inference.importance import token_importance
from megatron_tf.inference.model import load_model
from megatron_tf.model.parallelize import stage_layers
from megatron_tf.model.samples import samples_for
from megatron_tf.tokenformer.sizes import training_flops

# largest differences of logits that rounding explains, relative to the largest logit
EXACT = 1e-5
EXACT_IN_FP64 = 1e-12

STAGE_OPTIONS = {
    "hidden_multiple": "hidden_multiple",
    "init": "growth_init",
    "utility_data": "growth_data",
    "noise": "growth_noise",
    "mlp_init": "mlp_init",
    "num_layers": "num_layers",
    "layer_order": "layer_order",
    "layer_init": "layer_init",
    "shrink_factor": "shrink_factor",
    "perturb_std": "perturb_std",
    "adam_state": "adam_state",
    "step_scale": "step_scale",
    "old_tokens_lr_scale": "old_tokens_lr_scale",
    "new_tokens_lr_scale": "new_tokens_lr_scale",
    "rewarmup_iters": "rewarmup_iters",
    "rewarmup": "rewarmup",
}
"""Key of a growth stage -> the field of `Options` with the same values."""


class VerificationError(UserError):
    """Raised if the new checkpoint was written but fails verification."""

    exit_code = 3


def run(options: Options) -> None:
    """Reshard, grow or shrink as `options` select. Raises UserError for what a user can fix."""
    if options.save.resolve() == options.load.resolve():
        raise CheckpointError("--save is the same directory as --load: choose another")
    allow_more_files()  # one per rank and group is written
    source = CheckpointReader(options.load, check_at_end=True).complete()
    stage = growth_stage(options)
    result, is_exact = transform(source, options, stage)
    target = make_target(result, options.target_tensor_parallel_size, options.target_pipeline_parallel_size)
    plans = list(plan_files(result, target))
    print_plan(source, result, target=target, plans=plans)
    if stage:
        print(*advise(source.record, result.record.model), sep="\n", flush=True)
    if options.dry_run:
        return
    # before writing: unusable data is an error that leaves nothing behind
    samples = None if options.data is None else samples_for(source.record, options.data, options.data_tokens)
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
        print("verified: all checksums match, and every row is as expected, bit for bit", flush=True)
    if options.verify or samples is not None:
        compare_outputs(source.directory, path, samples, data=options.data, is_exact=is_exact)


def transform(source: CheckpointReader, options: Options, stage: GrowthStage | None) -> tuple[Checkpoint, bool]:
    """Return the checkpoint to write, and whether the outputs of its model should be unchanged."""
    if stage and undo_options(options):
        raise CheckpointError(f"{undo_options(options)[0]} and growth are separate steps: run the tool twice")
    result: Checkpoint
    if stage:
        # another reader, which checks each file before it is read: this one hashes files while they are copied
        utility = measure_utility(CheckpointReader(source.directory), stage) if needs_utility(stage) else None
        result = grow(source, stage, utility=utility)
    else:
        result = undone(source, options)
    if options.make_vocab_size_divisible_by is not None:
        if options.make_vocab_size_divisible_by < 1:
            raise CheckpointError(
                f"--make-vocab-size-divisible-by is {options.make_vocab_size_divisible_by}: it must be 1 or more"
            )
        result = pad_vocabulary(result, options.make_vocab_size_divisible_by)
    return result, not undo_options(options) and (stage is None or keeps_outputs(source.record.model, stage))


def undo_options(options: Options) -> list[str]:
    """Return the options in use that take something away from the model."""
    values = {
        "--shrink": options.shrink,
        "--divide-hidden": options.divide_hidden,
        "--drop-layers": options.drop_layers,
    }
    return [name for name, value in values.items() if value is not None]


def undone(source: CheckpointReader, options: Options) -> Checkpoint:
    """Take back parameter tokens or width, and then layers, as `options` select."""
    result: Checkpoint = source
    if options.shrink is not None:
        if options.divide_hidden is not None:
            raise CheckpointError("--divide-hidden and --shrink are separate steps: run the tool twice")
        result = shrunk(source, options)
    if options.divide_hidden is not None:
        result = divide_width(source, options.divide_hidden)
    if options.drop_layers is not None:
        result = drop_layers(result, parse_layers("--drop-layers", options.drop_layers, example="1,3"))
    return result


def growth_stage(options: Options) -> GrowthStage | None:
    """Build the growth stage from --stage and the options that override its keys; None for no growth."""
    values: dict[str, Any] = {}
    if options.stage:
        values = read_mapping(options.stage, expected="the keys of a growth stage")
    if options.grow is not None:
        counts = parse_token_option("--grow", ",".join(options.grow))
        values |= {f"{kind}_tokens": count for kind, count in counts.items()}
    if options.insert_layers is not None:
        values["insert_layers"] = parse_layers("--insert-layers", options.insert_layers, example="0,6,6")
    if options.adam_state is not None:
        values.pop("moments", None)  # the key's other name
    others = {key: getattr(options, option) for key, option in STAGE_OPTIONS.items()}
    values |= {key: value for key, value in others.items() if value is not None}
    return parse_config(GrowthStage, values, str(options.stage or "growth")) if values else None


def parse_layers(option: str, text: str, *, example: str) -> list[int]:
    """Parse "0,6,6" into layer indices. Raises CheckpointError naming the `option` if the text is malformed."""
    layers = text.split(",")
    if not all(layer.strip().isdecimal() for layer in layers):
        raise CheckpointError(f"{option} {text!r}: write layer indices, such as {example}")
    return [int(layer) for layer in layers]


def shrunk(source: CheckpointReader, options: Options) -> TransformedCheckpoint:
    """Drop the parameter tokens that contribute least on the data."""
    if options.data is None:
        raise CheckpointError("--shrink needs --data PREFIX: the tokens that contribute least on it are dropped")
    assert options.shrink is not None  # checked by `transform`
    tokens = parse_token_option("--shrink", options.shrink)
    if by_layer := [kind for kind, count in tokens.items() if not isinstance(count, int)]:
        raise CheckpointError(f"--shrink {by_layer[0]}: all layers shrink equally, write {by_layer[0]}=N")
    model = load_model(source.directory)
    samples = samples_for(source.record, options.data, options.data_tokens)
    importance = token_importance(model, samples)
    return shrink(source, keep_most_important(model.config, importance, tokens))  # type: ignore[arg-type]


def make_target(checkpoint: Checkpoint, tensor_parallel: int, pipeline_parallel: int) -> Target:
    """Build the target layout, with layers balanced over stages as in training."""
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
    """Print the tensors, parameters and FLOPs before and after."""
    print(f"{source.directory}, step {source.step:,}")
    print(f"  {'parameters':<36}{'shape before':>20}{'after':>20}{'before':>22}{'after':>22}")
    names_before, names_after = names_by_pattern(source, "model"), names_by_pattern(result, "model")
    for pattern, names in names_before.items():
        old_shape, old = _size_of(source, names)
        new_shape, new = _size_of(result, names_after[pattern])
        print(f"  {pattern:<36}{old_shape:>20}{new_shape:>20}{old:>22,}{new:>22,}")
    files = source.manifest.files
    rows = [
        ("all parameters", _parameters(source), _parameters(result)),
        ("layers", source.record.model.num_layers, result.record.model.num_layers),
        ("FLOPs per token in training", _flops(source), _flops(result)),
        ("files", len(files) - 1, len(plans)),
        ("bytes", sum(file.bytes for file in files.values()), sum(plan.nbytes for plan in plans)),
    ]
    for name, before, after in rows:
        print(f"  {name:<76}{before:>22,}{after:>22,}")
    largest_row = max(max(spec.row_bytes for spec in plan.specs) for plan in plans)
    print(
        f"  to tensor {target.tensor_parallel} x pipeline {len(target.stages)}; memory beyond the interpreter's: "
        f"at most {MEMORY_BLOCKS * max(BLOCK_BYTES, largest_row):,} bytes",
        flush=True,
    )


def _size_of(checkpoint: Checkpoint, names: list[str]) -> tuple[str, int]:
    """Return the shapes and the number of parameters of tensors whose names differ only in the layer."""
    shapes = [checkpoint.shape("model", name) for name in names]
    shape = common_shape(shapes)
    return f"{len(shapes)} of {shape}" if len(shapes) > 1 else shape, sum(map(math.prod, shapes))


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(checkpoint.shape("model", name)) for name in checkpoint.names("model"))


def _flops(checkpoint: Checkpoint) -> int:
    return training_flops(checkpoint.record.model, checkpoint.record.seq_length)


def check_tensors(expected: Checkpoint, path: Path, progress: Callable[[int], object]) -> None:
    """Raise VerificationError unless the checkpoint at `path` is intact and equals `expected` bit for bit."""
    found = CheckpointReader(path, check_at_end=True)
    for difference in differences(expected, found, progress):
        raise VerificationError(f"{path} is not as expected: {difference}")
    if found.record != expected.record:
        raise VerificationError(f"{path}: its metadata is not as expected")
    try:
        found.verify()
    except CheckpointError as error:
        raise VerificationError(str(error)) from error


def compare_outputs(
    before: Path, after: Path, samples: Sequence[Tensor] | None, *, data: Path | None, is_exact: bool
) -> None:
    """Print how the outputs of both models differ on samples of `data`, or else on random ids.

    It computes in fp64 for checkpoints of fp64 runs, and otherwise in fp32.

    Raises VerificationError if they should be equal but are not.
    """
    readers = [CheckpointReader(path) for path in (before, after)]
    dtype = stored_dtype(readers[0].record)
    needed = max(dtype.itemsize * _parameters(reader) for reader in readers)
    usable = usable_memory()
    if needed > usable:
        print(f"the logits are not compared: a model takes {needed:,} bytes, {usable:,} bytes of memory are free")
        return
    found = compare_models(before, after, samples, dtype=dtype)
    print(f"max |delta logit| before and after: {found.difference:.3g} (largest |logit| {found.largest:.3g})")
    if found.losses:
        old, new = found.losses
        print(f"loss on {data}: {old:.6f} before, {new:.6f} after ({new - old:+.2g})")
    if found.became_non_finite:
        raise VerificationError(
            f"{after}: {found.became_non_finite:,} logits became infinite or NaN: the new checkpoint cannot be used"
        )
    limit = (EXACT_IN_FP64 if dtype == torch.float64 else EXACT) * found.largest
    if found.difference <= limit:  # a NaN is not
        return
    if is_exact:
        raise VerificationError(f"{after}: the logits moved by {found.difference:.3g}, more than rounding explains")
    print("this change does not preserve the model's outputs (see --help)")
