"""Reshard a checkpoint for other parallel degrees, grow it or shrink it, offline and without a GPU.

The new checkpoint appears under --save when it is complete; an error leaves nothing there. A run resumes from
it with checkpoint.load, or, if it is copied there, checkpoint.save. Tensors are streamed in blocks: checkpoints may be
larger than the memory.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.commands.arguments import file_path, make_parser, parse
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
    grow: str | None
    growth_init: str | None
    growth_noise: float | None
    insert_layers: str | None
    moments: str | None
    old_tokens_lr_scale: float | None
    rewarmup_iters: int | None
    shrink: str | None


@command()
def main(arguments: list[str] | None = None) -> int:
    """Write the new checkpoint. After an error nothing is written; exit code 3: it was written, and --verify
    found it at fault."""
    options = parse_arguments(arguments)
    import_late("megatron_tf.commands.resharding")
    from megatron_tf.commands.resharding import run

    run(options)
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """The command line; names follow Megatron-LM's tool."""
    parser = make_parser(
        "reshard-checkpoint",
        __doc__,
        "Exit code: 0 done, 1 error and nothing written, 2 usage, 3 written but --verify finds a fault.",
    )
    add = parser.add_argument
    add("--load", type=file_path, required=True, help="checkpoint, or a run's directory of them")
    add("--save", type=file_path, required=True, help="directory for the new checkpoint")
    add(
        "--allow-existing",
        action="store_true",
        help="write next to the checkpoints that --save holds already, and replace the one of the same step",
    )
    add(
        "--target-tensor-parallel-size",
        type=int,
        default=1,
        metavar="T",
        help="tensor-parallel ranks that the new checkpoint is laid out for",
    )
    add(
        "--target-pipeline-parallel-size",
        type=int,
        default=1,
        metavar="P",
        help="pipeline stages that it is laid out for",
    )
    add("--make-vocab-size-divisible-by", type=int, metavar="M", help="pad the vocabulary again, to a multiple of this")
    add("--dry-run", action="store_true", help="say what would be done, and write nothing")
    add(
        "--verify",
        action="store_true",
        help="read everything back, compare it bit for bit, and compare the logits of both models where they fit",
    )
    add("--data", type=file_path, metavar="PREFIX", help=".bin/.idx to measure loss and importance on")
    add("--data-tokens", type=int, default=16384, metavar="N", help="how much of it")
    _add_growth_options(parser)
    add("--shrink", metavar="qkv=N,proj=N,ffn=N", help="keep the N tokens that contribute most on --data")
    return parse(parser, Options, arguments)


def _add_growth_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("growth", "what is not given keeps the default of a `growth:` stage in a config")
    add = group.add_argument
    add("--stage", type=file_path, metavar="FILE", help="YAML file with the keys of a stage")
    add("--grow", metavar="qkv=N,proj=N,ffn@0-5=N", help="new number of tokens by kind, or also by layer")
    add("--growth-init", choices=["zero_key", "duplicate", "random"], help="default: zero_key, exact")
    add("--growth-noise", type=float, metavar="X", help="noise on the values of duplicates; by default 0.1")
    add("--insert-layers", metavar="I,J,...", help="a new layer before each old one named")
    add(
        "--moments", choices=["keep", "reset"], help="optimizer state (Adam moments) of what was there; by default keep"
    )
    add("--old-tokens-lr-scale", type=float, metavar="X", help="of old tokens; 0 freezes them; by default 1")
    add("--rewarmup-iters", type=int, metavar="N", help="steps of warm-up after the growth; by default 0")
