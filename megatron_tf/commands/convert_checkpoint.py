"""Convert checkpoints from and to the official implementation's weights and Hugging Face directories.

One side is always megatron_tf. What is written appears under --save when it is complete; an error leaves
nothing there. Tensors keep every bit: those of 16 bits become fp32, which holds them exactly, and --dtype rounds
at an export. Other formats hold no optimizer state: an imported checkpoint starts with none, and can be grown,
resharded and trained as any other.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.commands.arguments import file_path, make_parser, parse
from megatron_tf.commands.runner import command, import_late

FORMATS = ("megatron_tf", "official", "hf")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    source: str
    target: str
    load: Path
    save: Path
    tokenizer_model: Path | None
    eod_token: str | None
    num_attention_heads: int | None
    norm_activation: str | None
    tokenizer_type: str | None
    vocab_size: int | None
    rotary_base: float | None
    rotary_percent: float | None
    layernorm_epsilon: float | None
    dtype: str | None
    seq_length: int
    data: Path | None
    data_tokens: int
    skip_check: bool


@command()
def main(arguments: list[str] | None = None) -> int:
    """Convert. Returns 0 when the result is complete, and for hf checked; after an error nothing is written."""
    options = parse_arguments(arguments)
    import_late("megatron_tf.commands.conversion")  # --help need not wait for torch
    from megatron_tf.commands.conversion import run

    run(options)
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """The command line."""
    parser = make_parser("convert-checkpoint", __doc__)
    add = parser.add_argument
    add("--from", dest="source", choices=FORMATS, required=True, help="format of --load")
    add("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    add(
        "--load",
        type=file_path,
        required=True,
        help="checkpoint, or a run's directory; a .bin file; a Hugging Face directory",
    )
    add("--save", type=file_path, required=True, help="directory to write")
    add("--tokenizer-model", type=file_path, metavar="FILE", help="the tokenizer's file")
    add("--eod-token", metavar="TOKEN", help="token that ends a document (default: the run's, or what its file names)")
    _add_official(parser)
    _add_huggingface(parser)
    options = parse(parser, Options, arguments)
    for name in ("seq_length", "data_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be 1 or more")
    if (options.source == "megatron_tf") == (options.target == "megatron_tf"):
        parser.error("one of --from and --to must be megatron_tf, and the other one not: convert in two steps")
    if options.dtype is not None and options.target != "official":
        parser.error(
            "--dtype is for --to official: our checkpoints are fp32, and transformers loads an export in any type with "
            "from_pretrained(DIR, dtype=...)"
        )
    return options


def _add_official(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "official", "what its file does not tell; heads, norm and tokenizer are needed to import"
    )
    add = group.add_argument
    add("--num-attention-heads", type=int, metavar="H", help="published: 12 (150M), 16 (the others)")
    add(
        "--norm-activation",
        choices=["l2_norm_gelu", "gelu_l2_norm", "softmax"],
        help="norm_activation_type of its configuration; published: l2_norm_gelu",
    )
    add("--tokenizer-type", metavar="T", help="with --tokenizer-model; published: HFTokenizer, GPT-NeoX-20B's")
    add(
        "--vocab-size", type=int, metavar="N", help="ids of the tokenizer, in place of its file; it is not checked then"
    )
    add("--rotary-base", type=float, metavar="B", help="rotary_emb_base of its configuration; published: 10000")
    add("--rotary-percent", type=float, metavar="P", help="rotary_pct of it; published: 0.25")
    add("--layernorm-epsilon", type=float, metavar="E", help="layernorm_epsilon of it; published: 1e-5")
    add(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the tensors that --to official writes; by default fp32",
    )
    add("--seq-length", type=int, default=2048, metavar="S", help="it was trained with")


def _add_huggingface(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("to hf").add_argument
    add("--data", type=file_path, metavar="PREFIX", help=".bin/.idx to measure the loss of the model card on")
    add("--data-tokens", type=int, default=16384, metavar="N", help="how much of it")
    add("--skip-check", action="store_true", help="do not load the result with transformers and compare the logits")
