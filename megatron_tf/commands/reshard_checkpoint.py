"""Reshard a checkpoint for other parallel sizes, grow it or shrink it, offline and without a GPU.

The new checkpoint appears under --save once it is complete; after an error nothing is written. Start a run from it
with checkpoint.load. Tensors are streamed in blocks, so checkpoints may be larger than memory.

Examples:
    megatron-tf reshard-checkpoint --load runs/small --save runs/tp2 --target-tensor-parallel-size 2 --verify
    megatron-tf reshard-checkpoint --load runs/small --save runs/grown --grow qkv=1024,proj=1024,ffn=4096
    megatron-tf reshard-checkpoint --load runs/small --save runs/wide --hidden-multiple 2
    megatron-tf reshard-checkpoint --load runs/small --save runs/deep --num-layers 24 --layer-init copy_zero
    megatron-tf reshard-checkpoint --load runs/deep --save runs/undone --drop-layers 1,3
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.commands.arguments import file_path, file_prefix, make_parser, parse, positive_int
from megatron_tf.commands.runner import command, import_late


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; names follow Megatron-LM's tool."""

    load: Path
    save: Path
    allow_existing: bool
    target_tensor_parallel_size: int
    target_pipeline_parallel_size: int
    make_vocab_size_divisible_by: int | None
    dry_run: bool
    verify: bool
    data: Path | None
    data_tokens: int
    stage: Path | None
    grow: list[str] | None
    growth_init: str | None
    growth_data: str | None
    growth_noise: float | None
    mlp_init: str | None
    num_layers: int | None
    insert_layers: str | None
    layer_order: str | None
    layer_init: str | None
    shrink_factor: float | None
    perturb_std: float | None
    adam_state: str | None
    step_scale: str | None
    old_tokens_lr_scale: float | None
    new_tokens_lr_scale: float | None
    rewarmup_iters: int | None
    rewarmup: str | None
    hidden_multiple: float | None
    shrink: str | None
    divide_hidden: int | None
    drop_layers: str | None


@command()
def main(arguments: list[str] | None = None) -> int:
    """Write the new checkpoint. After an error nothing is written; exit code 3 means that it was written, but --verify
    found an error in it."""
    options = parse_arguments(arguments)
    import_late("megatron_tf.commands.resharding")
    from megatron_tf.commands.resharding import run

    run(options)
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """Parse the command line; names follow Megatron-LM's tool."""
    parser = make_parser(
        "reshard-checkpoint",
        __doc__,
        "Exit code: 0 done, 1 error and nothing written, 2 usage, 3 written but --verify found an error.",
    )
    add = parser.add_argument
    add("--load", type=file_path, required=True, help="checkpoint, or directory of a run, whose newest one is used")
    add("--save", type=file_path, required=True, help="directory for the new checkpoint")
    add(
        "--allow-existing",
        action="store_true",
        help="allow other checkpoints in --save, and replace the one of the same step",
    )
    add("--dry-run", action="store_true", help="print the plan without writing anything")
    add(
        "--verify",
        action="store_true",
        help="read everything back and compare it bit for bit; also compare the logits of both models if memory allows",
    )
    add(
        "--data",
        type=file_path,
        metavar="PREFIX",
        help="dataset (.bin/.idx) for --shrink, and for comparing the loss before and after",
    )
    add("--data-tokens", type=positive_int, default=16384, metavar="N", help="number of tokens of --data to use")
    _add_layout_options(parser)
    _add_token_options(parser)
    _add_layer_options(parser)
    _add_training_options(parser)
    _add_undo_options(parser)
    return parse(parser, Options, arguments)


def _add_layout_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("layout of the new checkpoint").add_argument
    add(
        "--target-tensor-parallel-size",
        type=int,
        default=1,
        metavar="T",
        help="tensor-parallel size of the new checkpoint",
    )
    add(
        "--target-pipeline-parallel-size",
        type=int,
        default=1,
        metavar="P",
        help="pipeline-parallel size of the new checkpoint",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="M",
        help="change the padding of the vocabulary to a multiple of this",
    )


def _add_token_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("growth", "defaults are those of a `growth:` stage in a configuration")
    add = group.add_argument
    add(
        "--stage",
        type=file_path,
        metavar="FILE",
        help="YAML file with the keys of a growth stage, `optimizer` included; the options below override it",
    )
    add(
        "--hidden-multiple",
        type=float,
        metavar="M",
        help="multiply the width and the number of attention heads by an integer or by 1.5, which keeps the outputs",
    )
    add(
        "--grow",
        action="append",
        metavar="qkv=N,proj=N,ffn@0-5=N",
        help="new number of parameter tokens by kind, for all layers or those after the @",
    )
    add(
        "--growth-init",
        choices=["auto", "zero_key", "rotated_key", "zero_value", "duplicate", "duplicate_by_utility", "random"],
        help="how new tokens are initialized; by default auto: rotated_key if they at least double under l2_norm_gelu, "
        "otherwise zero_key; both keep the outputs",
    )
    add(
        "--growth-data",
        type=file_prefix,
        metavar="PREFIX",
        help="dataset (.bin/.idx) on which duplicate_by_utility measures the contribution of each token",
    )
    add("--growth-noise", type=float, metavar="X", help="relative noise on copies; by default 0.1")
    add(
        "--mlp-init",
        choices=["zero_key", "zero_value", "duplicate"],
        help="how new hidden units of a plain transformer are initialized: zero rows of the up projection (the "
        "default) or of the down projection, or copies of the old units; each keeps the outputs",
    )
    add(
        "--shrink-factor",
        type=float,
        metavar="X",
        help="multiply the old weights by this after the growth, which changes the outputs; by default 1",
    )
    add(
        "--perturb-std",
        type=float,
        metavar="X",
        help="add noise of this standard deviation to the old weights after the growth; by default 0",
    )


def _add_layer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("growth of layers").add_argument
    add("--num-layers", type=int, metavar="N", help="new number of layers, placed by --layer-order")
    add(
        "--layer-order",
        choices=["interleaved", "stacked", "middle"],
        help="which of the L old layers is at place i of N: floor(i L / N), so that copies follow their layer (the "
        "default); i mod L, the whole stack repeated; or the middle layers repeated",
    )
    add(
        "--insert-layers",
        metavar="I,J,...",
        help="insert a new layer before each of these layers; instead of --num-layers",
    )
    add(
        "--layer-init",
        choices=["identity", "copy_zero", "copy"],
        help="how new layers are initialized: as in a new model (the default) or as copies of old layers, both with "
        "zeros where they end, which keeps the outputs; or as full copies with their optimizer state, which does not",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training after the growth").add_argument
    add(
        "--adam-state",
        "--moments",
        choices=["keep", "reset", "reset_new", "reset_second"],
        help="which Adam moments restart from zero: none (the default; copies inherit theirs), all, those of all new "
        "rows, or all second moments",
    )
    add(
        "--step-scale",
        choices=["preserve", "none"],
        help="scale the Adam updates of copies so that growing commutes with an optimizer step, or do not; by default "
        "preserve",
    )
    add(
        "--old-tokens-lr-scale",
        type=float,
        metavar="X",
        help="relative learning rate of old tokens, 0 freezes them; by default 1",
    )
    add("--new-tokens-lr-scale", type=float, metavar="X", help="relative learning rate of new tokens; by default 1")
    add("--rewarmup-iters", type=int, metavar="N", help="learning-rate warm-up steps after the growth; by default 0")
    add(
        "--rewarmup",
        choices=["all", "new"],
        help="whether the warm-up applies to all parameters or to new rows only; by default all",
    )


def _add_undo_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("undo", "not together with growth, which is a separate step")
    add = group.add_argument
    add(
        "--shrink",
        metavar="qkv=N,proj=N,ffn=N",
        help="keep only the N parameter tokens of each kind that contribute most on --data",
    )
    add(
        "--divide-hidden",
        type=int,
        metavar="M",
        help="merge the M copies of a model's width that --hidden-multiple made, which undoes it",
    )
    add(
        "--drop-layers",
        metavar="I,J,...",
        help="remove these layers, numbered from 0 as in --load; removing new layers that are still the identity does "
        "not change the output",
    )
