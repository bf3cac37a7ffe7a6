"""Convert checkpoints from and to the official implementation's weights and Hugging Face directories.

One side is always megatron_tf. What is written appears under --save when it is complete; an error leaves
nothing there. Tensors keep every bit: those of 16 bits become fp32, which holds them exactly, and --dtype rounds
at an export. Other formats hold no optimizer state: an imported checkpoint starts with none, and can be grown,
resharded and trained as any other.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.commands.arguments import file_path, make_parser, parse
from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from megatron_tf.checkpoint.interface import Checkpoint
    from megatron_tf.checkpoint.load import CheckpointReader
    from megatron_tf.config import ModelConfig
    from megatron_tf.convert.external import TokenizerChoice
    from megatron_tf.data.tokenizer import Tokenizer

FORMATS = ("megatron_tf", "official", "hf")


class ConversionError(UserError):
    """What a user can fix in the command."""


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
    import_late("torch")  # --help need not wait for it
    CONVERSIONS[options.source, options.target](options)
    return 0


def parse_arguments(arguments: list[str] | None) -> Options:
    """The command line."""
    parser = make_parser("convert-checkpoint", __doc__)
    parser.add_argument("--from", dest="source", choices=FORMATS, required=True, help="format of --load")
    parser.add_argument("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    parser.add_argument(
        "--load",
        type=file_path,
        required=True,
        help="checkpoint, or a run's directory; a .bin file; a Hugging Face directory",
    )
    parser.add_argument("--save", type=file_path, required=True, help="directory to write")
    parser.add_argument("--tokenizer-model", type=file_path, metavar="FILE", help="the tokenizer's file")
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help="token that ends a document (default: the run's, or what its file names)"
    )
    official = parser.add_argument_group(
        "official", "what its file does not tell; heads, norm and tokenizer are needed to import"
    )
    official.add_argument("--num-attention-heads", type=int, metavar="H", help="published: 12 (150M), 16 (the others)")
    official.add_argument(
        "--norm-activation",
        choices=["l2_norm_gelu", "gelu_l2_norm", "softmax"],
        help="norm_activation_type of its configuration; published: l2_norm_gelu",
    )
    official.add_argument(
        "--tokenizer-type", metavar="T", help="with --tokenizer-model; published: HFTokenizer, GPT-NeoX-20B's"
    )
    official.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids of the tokenizer, in place of its file; it is not checked then"
    )
    official.add_argument(
        "--rotary-base", type=float, metavar="B", help="rotary_emb_base of its configuration; published: 10000"
    )
    official.add_argument("--rotary-percent", type=float, metavar="P", help="rotary_pct of it; published: 0.25")
    official.add_argument(
        "--layernorm-epsilon", type=float, metavar="E", help="layernorm_epsilon of it; published: 1e-5"
    )
    official.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="type of the tensors that --to official writes; by default fp32",
    )
    official.add_argument("--seq-length", type=int, default=2048, metavar="S", help="it was trained with")
    hf = parser.add_argument_group("to hf")
    hf.add_argument(
        "--data", type=file_path, metavar="PREFIX", help=".bin/.idx to measure the loss of the model card on"
    )
    hf.add_argument("--data-tokens", type=int, default=16384, metavar="N", help="how much of it")
    hf.add_argument(
        "--skip-check", action="store_true", help="do not load the result with transformers and compare the logits"
    )
    options = parse(parser, Options, arguments)
    for name in ("seq_length", "data_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be 1 or more")
    if (options.source, options.target) not in CONVERSIONS:
        parser.error("one of --from and --to must be megatron_tf, and the other one not: convert in two steps")
    if options.dtype is not None and options.target != "official":
        parser.error(
            "--dtype is for --to official: our checkpoints are fp32, and transformers loads an export in any type with "
            "from_pretrained(DIR, dtype=...)"
        )
    return options


def import_official(options: Options) -> None:
    """A .bin file -> our checkpoint."""
    from megatron_tf.config import ModelConfig, TrainingConfig, parse_config
    from megatron_tf.convert.external import ExternalCheckpoint, new_record, rename
    from megatron_tf.convert.official.writing import (
        PUBLISHED,
        infer_model,
        official_name,
        read_official,
        without_frequencies,
    )
    from megatron_tf.tokenformer.parameters import initial_taus, model_parameters

    needed = ["num_attention_heads", "norm_activation"] + ["tokenizer_type"] * (options.vocab_size is None)
    for option in needed:
        if getattr(options, option) is None:
            raise ConversionError(f"{options.load} does not tell --{option.replace('_', '-')}: give it (see --help)")
    tensors = read_official(options.load)
    choice = choose_tokenizer(options)
    told = {key: getattr(options, key) for key in PUBLISHED}
    values = infer_model(options.load, tensors, choice.identity["vocab_size"]) | {
        **{key: published if told[key] is None else told[key] for key, published in PUBLISHED.items()},
        "num_attention_heads": options.num_attention_heads,
        "norm_activation": options.norm_activation,
    }
    model = parse_config(ModelConfig, values, str(options.load))
    record = new_record(model, initial_taus(model), choice, seq_length=options.seq_length, seed=TrainingConfig.seed)
    tensors = without_frequencies(options.load, tensors, model)
    renamed = rename(
        options.load,
        tensors,
        expected=model_parameters(model).values(),
        their_name=lambda parameter: official_name(parameter, model.num_layers),
    )
    write_ours(ExternalCheckpoint(options.load, renamed, record), options.save)


def choose_tokenizer(options: Options) -> "TokenizerChoice":
    """From its file, or from --vocab-size: then any tokenizer of so many ids is accepted later."""
    from megatron_tf.convert.external import TokenizerChoice, unknown_tokenizer
    from megatron_tf.data.tokenizer import build_tokenizer

    if options.vocab_size is None:
        assert options.tokenizer_type is not None  # `import_official` has demanded it
        tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token)
        check_end(tokenizer, options.eod_token)
        return TokenizerChoice(options.tokenizer_type, options.tokenizer_model, tokenizer.identity, options.eod_token)
    if options.tokenizer_model is not None:
        raise ConversionError("--vocab-size stands for a tokenizer that is not available: leave --tokenizer-model out")
    if options.vocab_size < 1:
        raise ConversionError(f"--vocab-size is {options.vocab_size}: it must be 1 or more")
    kind = options.tokenizer_type or "HFTokenizer"
    return TokenizerChoice(kind, None, unknown_tokenizer(kind, options.vocab_size), options.eod_token)


def check_end(tokenizer: "Tokenizer", eod_token: str | None) -> None:
    """Raise DataError where a tokenizer does not have the token that was named as the end of a document."""
    if eod_token is not None:
        _ = tokenizer.eod


def import_huggingface(options: Options) -> None:
    """A directory that `export_huggingface` wrote -> our checkpoint."""
    from megatron_tf.convert.huggingface.export import read_export, tokenizer_file

    if options.save.resolve().is_relative_to(options.load.resolve()):
        raise ConversionError(f"--save {options.save} is inside --load {options.load}: choose another directory")
    checkpoint = read_export(options.load)
    path = options.tokenizer_model or tokenizer_file(options.load, checkpoint.record.data["tokenizer_type"])
    checkpoint.record = checkpoint.record.with_data(tokenizer_model=None if path is None else str(path))
    set_end(checkpoint, options.eod_token)
    check_end(the_tokenizer(checkpoint, path), options.eod_token)
    write_ours(checkpoint, options.save)


def set_end(checkpoint: "Checkpoint", eod_token: str | None) -> None:
    """Let documents end with a token other than the run's, where one is given."""
    if eod_token is not None:
        checkpoint.record = checkpoint.record.with_data(eod_token=eod_token)


def write_ours(checkpoint: "Checkpoint", save: Path) -> None:
    """Stream it to a checkpoint for one rank."""
    from megatron_tf.checkpoint.reshard import Target, reshard

    target = Target(tensor_parallel=1, stages=[range(checkpoint.record.model.num_layers)])
    path = reshard(checkpoint, save, target, check_source=lambda: None, on_terminal=sys.stderr.isatty())
    print(f"wrote {path}")


def export_official(options: Options) -> None:
    """Our checkpoint -> a .bin file."""
    import torch

    from megatron_tf.convert.external import WEIGHT_DTYPES, parameter_bytes
    from megatron_tf.convert.official.writing import FILE, PUBLISHED, check_representable, check_told, write_official

    dtype = WEIGHT_DTYPES[options.dtype or "fp32"]
    source, model = open_ours(options.load)
    check_representable(source, model)
    check_told(source.directory, model, {key: getattr(options, key) for key in PUBLISHED})
    nbytes = parameter_bytes(source) * dtype.itemsize // torch.float32.itemsize
    with new_directory(options.save, nbytes) as directory:
        write_official(source, model, directory / FILE, dtype)
        source.verify()
    print(f"wrote {options.save / FILE}")
    end = source.record.data.get("eod_token")
    if end is not None:
        print(f"an official file does not tell the end of a document: import it with --eod-token {end!r}")


def export_huggingface(options: Options) -> None:
    """Our checkpoint -> a directory for transformers, loaded with it and compared."""
    from megatron_tf.checkpoint.reshard import progress_bar
    from megatron_tf.checkpoint.tokenizer_file import find_tokenizer
    from megatron_tf.convert.external import parameter_bytes
    from megatron_tf.convert.huggingface.check import has_transformers
    from megatron_tf.convert.huggingface.export import write_surroundings
    from megatron_tf.convert.huggingface.tensors import write_tensors

    if not (options.skip_check or has_transformers()):
        raise ConversionError(
            "the export is checked with transformers, which is not installed: pip install 'megatron_tf[hf]', or give "
            "--skip-check"
        )
    source, _ = open_ours(options.load)
    set_end(source, options.eod_token)
    path = options.tokenizer_model or find_tokenizer(source.record, source.directory)
    tokenizer = the_tokenizer(source, path)
    measured = measure(source, options.data, options.data_tokens) if options.data else None
    nbytes = parameter_bytes(source)
    with new_directory(options.save, nbytes) as directory:
        write_surroundings(source, directory, tokenizer, tokenizer_file=path, measured=measured)
        with progress_bar("writing", nbytes, sys.stderr.isatty()) as bar:
            write_tensors(source, directory, bar)
        source.verify()
        if options.skip_check:
            print("the logits are not compared: --skip-check")
        else:
            check(source, directory, tokenizer)
    print(f"wrote {options.save}")


def open_ours(path: Path) -> "tuple[CheckpointReader, ModelConfig]":
    """A checkpoint that is read once from front to back, and its model."""
    from megatron_tf.checkpoint.load import CheckpointReader

    source = CheckpointReader(path, check_at_end=True).complete()
    return source, source.record.model


def the_tokenizer(checkpoint: "Checkpoint", path: Path | None) -> "Tokenizer":
    """The tokenizer that the checkpoint was trained with, in the file at `path`.

    Raises ConversionError where it is another."""
    from megatron_tf.checkpoint.record import is_same_tokenizer
    from megatron_tf.data.tokenizer import build_tokenizer
    from megatron_tf.inference.tokenizer import check_found

    data = checkpoint.record.data
    kind = data["tokenizer_type"]
    check_found(kind, path, checkpoint.directory)
    tokenizer = build_tokenizer(kind, path, eod_token=data.get("eod_token"))
    if not is_same_tokenizer(checkpoint.record.tokenizer, tokenizer.identity):
        raise ConversionError(
            f"{path} is not the tokenizer that {checkpoint.directory} was trained with: give it with --tokenizer-model"
        )
    return tokenizer


def measure(source: "CheckpointReader", data: Path, num_tokens: int) -> str:
    """The mean loss on the front of a data set, in words for the model card."""
    from megatron_tf.inference.comparison import mean_loss, read_samples
    from megatron_tf.inference.model import load_model
    from megatron_tf.inference.tokenizer import check_made_with

    check_made_with(data, source.record.tokenizer)
    model = load_model(source.directory)
    seq_length = source.record.seq_length
    samples = read_samples(data, model.config.vocab_size, seq_length, num_tokens)
    tokens = len(samples) * seq_length
    loss = mean_loss(model, samples)
    if not math.isfinite(loss):
        raise ConversionError(f"the loss on {data} is {loss}: the model of {source.directory} cannot be used")
    return f"{loss:.4f} nats a token on the first {tokens:,} tokens of {data.name}."


def check(source: "CheckpointReader", directory: Path, tokenizer: "Tokenizer") -> None:
    """Raise ConversionError unless transformers computes the same logits from the directory, and generates by them."""
    import torch

    from megatron_tf.convert.huggingface import check as compare
    from megatron_tf.convert.huggingface.export import texts_with_special_pieces, tokenizer_file
    from megatron_tf.data.bpe_engine import PROBES

    for dtype in (torch.float32, torch.float64):  # in the second, rounding is no excuse
        differences, largest = compare.logits_differences(source.directory, directory, dtype)
        worst = float(torch.tensor(list(differences.values())).max())  # NaN where one of them is
        what = f"max |delta logit| between megatron_tf and transformers in {str(dtype).removeprefix('torch.')}"
        print(f"{what}: {worst:.3g} (largest |logit| {largest:.3g})", flush=True)
        if worst <= compare.TOLERANCE:
            break
    else:
        way = next(way for way, difference in differences.items() if not difference <= compare.TOLERANCE)
        raise ConversionError(
            f"the exported model's logits differ by {differences[way]:.3g} in {way}, more than {compare.TOLERANCE:g}"
        )
    if not (directory / "tokenizer_config.json").exists():
        print(f"no tokenizer files: transformers has none for a {tokenizer.identity['type']}")
        return
    if not (directory / "tokenizer.json").exists():
        compare.convert_tokenizer(directory)
    kind = tokenizer.identity["type"]
    file = tokenizer_file(directory, kind)
    special = [] if file is None else texts_with_special_pieces(kind, file)
    for texts in (PROBES, special):
        if (text := compare.tokenizer_difference(directory, tokenizer, texts)) is not None:
            print(f"warning: transformers encodes otherwise than megatron_tf with this tokenizer: {text[:40]!r}")


@contextmanager
def new_directory(save: Path, bytes_needed: int) -> Iterator[Path]:
    """A directory of the name of `save` to fill, which takes its place at the end, or vanishes after an error."""
    from megatron_tf.checkpoint.commit import check_room
    from megatron_tf.checkpoint.destination import check_outside_checkpoints
    from megatron_tf.files import sync_directory, sync_tree

    check_outside_checkpoints(save, "--save")
    if save.exists() and not (save.is_dir() and not any(save.iterdir())):
        raise ConversionError(f"{save} is there already: choose another --save, or remove it")
    workplace = save.with_name(f".{save.name}.tmp")
    shutil.rmtree(workplace, ignore_errors=True)
    directory = workplace / save.name
    directory.mkdir(parents=True)
    try:
        check_room(directory, bytes_needed)
        yield directory
        sync_tree(directory)
        directory.replace(save)
        sync_directory(save.parent)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


CONVERSIONS: dict[tuple[str, str], Callable[[Options], None]] = {
    ("official", "megatron_tf"): import_official,
    ("megatron_tf", "official"): export_official,
    ("hf", "megatron_tf"): import_huggingface,
    ("megatron_tf", "hf"): export_huggingface,
}
