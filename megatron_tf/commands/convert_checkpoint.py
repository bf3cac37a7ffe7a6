"""Convert checkpoints to and from the official implementation's weights and Hugging Face directories.

Either --from or --to is megatron_tf. The result appears under --save once it is complete; after an error nothing is
written. Imports are exact, since fp32 can represent all 16-bit values. Other formats have no optimizer state, so
an imported checkpoint starts without one; it can be grown, resharded and trained like any other.

Examples:
    megatron-tf convert-checkpoint --from megatron_tf --to hf --load runs/small --save export
    megatron-tf convert-checkpoint --from official --to megatron_tf --load pytorch_model.bin --save imported \\
        --num-attention-heads 12 --norm-activation l2_norm_gelu --tokenizer-type HFTokenizer --tokenizer-model FILE
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.commands.arguments import file_path, make_parser, parse, positive_int
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
    """Convert a checkpoint. Returns 0 if the result is complete and, for hf, checked; errors leave nothing behind."""
    options = parse_arguments(arguments)
    import_late("megatron_tf.commands.conversion")  # imported here so that --help is fast
    from megatron_tf.commands.conversion import run

    run(options)
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """Parse the command line."""
    parser = make_parser("convert-checkpoint", __doc__)
    add = parser.add_argument
    add("--from", dest="source", choices=FORMATS, required=True, help="format of --load")
    add("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    add(
        "--load",
        type=file_path,
        required=True,
        help="checkpoint or directory of a run; official .bin file; or Hugging Face directory",
    )
    add("--save", type=file_path, required=True, help="directory to create")
    add(
        "--tokenizer-model",
        type=file_path,
        metavar="FILE",
        help="the tokenizer's file, if it is not the one in the source",
    )
    add(
        "--eod-token",
        metavar="TOKEN",
        help="end-of-document token (default: the run's, or the one in the tokenizer's file)",
    )
    _add_official(parser)
    _add_huggingface(parser)
    options = parse(parser, Options, arguments)
    if (options.source == "megatron_tf") == (options.target == "megatron_tf"):
        parser.error("exactly one of --from and --to must be megatron_tf: convert in two steps")
    if options.dtype is not None and options.target != "official":
        parser.error(
            "--dtype is for --to official: our checkpoints are fp32, and transformers loads an export in any type with "
            "from_pretrained(DIR, dtype=...)"
        )
    return options


def _add_official(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "official", "facts that official files do not contain; imports need the heads, the norm and the tokenizer"
    )
    add = group.add_argument
    add(
        "--num-attention-heads",
        type=int,
        metavar="H",
        help="number of attention heads; published models: 12 (150M), 16 (others)",
    )
    add(
        "--norm-activation",
        choices=["l2_norm_gelu", "gelu_l2_norm", "softmax"],
        help="norm_activation_type of the official configuration; published models: l2_norm_gelu",
    )
    add(
        "--tokenizer-type",
        metavar="T",
        help="type of --tokenizer-model; published models: HFTokenizer, with GPT-NeoX-20B's file",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="size of the tokenizer, if its file is not available; it is then not checked",
    )
    add(
        "--rotary-base",
        type=float,
        metavar="B",
        help="rotary_emb_base of the official configuration; published models: 10000",
    )
    add(
        "--rotary-percent",
        type=float,
        metavar="P",
        help="rotary_pct of the official configuration; published models: 0.25",
    )
    add(
        "--layernorm-epsilon",
        type=float,
        metavar="E",
        help="layernorm_epsilon of the official configuration; published models: 1e-5",
    )
    add(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="data type of the tensors written by --to official; by default fp32",
    )
    add(
        "--seq-length",
        type=positive_int,
        default=2048,
        metavar="S",
        help="sequence length that the model was trained with",
    )


def _add_huggingface(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("export to hf").add_argument
    add(
        "--data",
        type=file_path,
        metavar="PREFIX",
        help="dataset (.bin/.idx) to measure the loss on, for the model card",
    )
    add("--data-tokens", type=positive_int, default=16384, metavar="N", help="number of tokens of --data to use")
    add("--skip-check", action="store_true", help="skip loading the result with transformers and comparing the logits")
