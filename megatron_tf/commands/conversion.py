"""Implementation of `convert-checkpoint`."""

import math
from functools import partial
from pathlib import Path

import torch

from megatron_tf.checkpoint.contents import stored_dtype
from megatron_tf.checkpoint.destination import new_directory
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import Target, reshard
from megatron_tf.checkpoint.tokenizer_file import find_tokenizer
from megatron_tf.commands.convert_checkpoint import Options
from megatron_tf.commands.progress import byte_bar
from megatron_tf.convert.external import TokenizerChoice, parameter_bytes, unknown_tokenizer
from megatron_tf.convert.huggingface import check
from megatron_tf.convert.huggingface.export import (
    read_export,
    texts_with_special_pieces,
    tokenizer_file,
    write_config_and_tokenizer,
)
from megatron_tf.convert.huggingface.plain import RELATIVE_TOLERANCE
from megatron_tf.convert.huggingface.tensors import write_tensors
from megatron_tf.convert.official.names import FILE, PUBLISHED
from megatron_tf.convert.official.reading import read_official
from megatron_tf.convert.official.writing import check_confirmed, check_representable, write_official
from megatron_tf.data.bpe_engine import PROBES
from megatron_tf.data.tokenizer import Tokenizer, build_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.extras import install_command
from megatron_tf.inference.comparison import mean_token_loss
from megatron_tf.inference.model import load_model
from megatron_tf.inference.tokenizer import tokenizer_of
from megatron_tf.model.samples import samples_for
from megatron_tf.tokenformer.dtypes import DTYPES


def run(options: Options) -> None:
    """Run the conversion that `options` select. Raises UserError for what a user can fix."""
    conversions = {
        ("official", "megatron_tf"): import_official,
        ("megatron_tf", "official"): export_official,
        ("hf", "megatron_tf"): import_huggingface,
        ("megatron_tf", "hf"): export_huggingface,
    }
    conversions[options.source, options.target](options)


def import_official(options: Options) -> None:
    """Import an official .bin file as a checkpoint of ours."""
    needed = ["num_attention_heads", "norm_activation"]
    if options.vocab_size is None:
        needed.append("tokenizer_type")
    for option in needed:
        if getattr(options, option) is None:
            raise UserError(
                f"{options.load} does not contain --{option.replace('_', '-')}: give this option (see --help)"
            )
    keys = ("num_attention_heads", "norm_activation", *PUBLISHED)
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    tokenizer = choose_tokenizer(options)
    write_ours(read_official(options.load, tokenizer, given=given, seq_length=options.seq_length), options.save)


def choose_tokenizer(options: Options) -> TokenizerChoice:
    """Return the tokenizer in a file, or with --vocab-size an unknown one: any tokenizer of that size is accepted
    later."""
    if options.vocab_size is None:
        assert options.tokenizer_type is not None  # checked by `import_official`
        tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, eod_token=options.eod_token)
        check_end(tokenizer, options.eod_token)
        return TokenizerChoice(
            kind=options.tokenizer_type,
            path=options.tokenizer_model,
            identity=tokenizer.identity,
            eod_token=options.eod_token,
        )
    if options.tokenizer_model is not None:
        raise UserError("--vocab-size stands for a tokenizer that is not available: leave --tokenizer-model out")
    if options.vocab_size < 1:
        raise UserError(f"--vocab-size is {options.vocab_size}: it must be 1 or more")
    kind = options.tokenizer_type or "HFTokenizer"
    return TokenizerChoice(
        kind=kind, path=None, identity=unknown_tokenizer(kind, options.vocab_size), eod_token=options.eod_token
    )


def check_end(tokenizer: Tokenizer, eod_token: str | None) -> None:
    """Raise DataError if a tokenizer does not have the requested end-of-document token."""
    if eod_token is not None:
        _ = tokenizer.eod


def import_huggingface(options: Options) -> None:
    """Import a directory written by `export_huggingface` as a checkpoint of ours."""
    if options.save.resolve().is_relative_to(options.load.resolve()):
        raise UserError(f"--save {options.save} is inside --load {options.load}: choose another directory")
    checkpoint = read_export(options.load)
    path = options.tokenizer_model or tokenizer_file(options.load, checkpoint.record.data["tokenizer_type"])
    checkpoint.record = checkpoint.record.with_data(tokenizer_model=None if path is None else str(path))
    set_end(checkpoint, options.eod_token)
    check_end(tokenizer_of(checkpoint.record, checkpoint.directory, path), options.eod_token)
    write_ours(checkpoint, options.save)


def set_end(checkpoint: Checkpoint, eod_token: str | None) -> None:
    """Replace the run's end-of-document token if one is given."""
    if eod_token is not None:
        checkpoint.record = checkpoint.record.with_data(eod_token=eod_token)


def write_ours(checkpoint: Checkpoint, save: Path) -> None:
    """Stream it to a checkpoint of ours for one rank."""
    target = Target(tensor_parallel=1, stages=[range(checkpoint.record.model.num_layers)])
    with byte_bar("writing", parameter_bytes(checkpoint)) as bar:
        path = reshard(checkpoint, save, target, progress=bar.update)
    print(f"wrote {path}")


def export_official(options: Options) -> None:
    """Export a checkpoint of ours as an official .bin file."""
    name = options.dtype or "fp32"
    dtype = DTYPES[name]
    source = open_ours(options.load)
    check_representable(source)
    check_confirmed(source, {key: getattr(options, key) for key in PUBLISHED})
    say_rounding(source, name)
    with new_directory(options.save, parameter_bytes(source, dtype)) as directory:
        write_official(source, directory / FILE, dtype)
        source.verify()
    print(f"wrote {options.save / FILE}")
    end = source.record.data.get("eod_token")
    if end is not None:
        print(f"an official file does not record the end-of-document token: import it with --eod-token {end!r}")


def export_huggingface(options: Options) -> None:
    """Export a checkpoint of ours as a directory for transformers, load it there and compare the outputs."""
    if not (options.skip_check or check.has_transformers()):
        raise UserError(
            f"the export is checked with transformers, which is not installed: {install_command('hf')}, or use "
            f"--skip-check"
        )
    source = open_ours(options.load)
    set_end(source, options.eod_token)
    path = options.tokenizer_model or find_tokenizer(source.record, source.directory)
    tokenizer = tokenizer_of(source.record, source.directory, path)
    measured = None
    if options.data is not None:
        measured = measure(source, options.data, options.data_tokens)
    say_rounding(source, "fp32")
    nbytes = parameter_bytes(source)
    with new_directory(options.save, nbytes) as directory:
        write_config_and_tokenizer(source, directory, tokenizer, tokenizer_path=path, measured=measured)
        with byte_bar("writing", nbytes) as bar:
            write_tensors(source, directory, bar.update)
        source.verify()
        if options.skip_check:
            print("logits not compared (--skip-check)")
        else:
            is_plain = source.record.model.layer == "transformer"
            tolerance = RELATIVE_TOLERANCE if is_plain else 0.0
            say = partial(print, flush=True)
            check.check_logits(source.directory, directory, say=say, relative_tolerance=tolerance)
            compare_tokenizers(directory, tokenizer)
    print(f"wrote {options.save}")


def open_ours(path: Path) -> CheckpointReader:
    """Open a complete checkpoint that is read once, sequentially."""
    return CheckpointReader(path, check_at_end=True).complete()


def say_rounding(source: CheckpointReader, name: str) -> None:
    """Say that the export rounds the parameters of an fp64 checkpoint to the dtype `name`."""
    if stored_dtype(source.record) == torch.float64:
        print(f"{source.directory} is in fp64: its parameters are rounded to {name}")


def measure(source: CheckpointReader, data: Path, num_tokens: int) -> str:
    """Measure the mean loss on the start of a dataset; return a sentence for the model card."""
    samples = samples_for(source.record, data, num_tokens)
    loss = mean_token_loss(load_model(source.directory), samples)
    if not math.isfinite(loss):
        raise UserError(f"the loss on {data} is {loss}: the model of {source.directory} cannot be used")
    return f"{loss:.4f} nats a token on the first {len(samples) * source.record.seq_length:,} tokens of {data.name}."


def compare_tokenizers(directory: Path, tokenizer: Tokenizer) -> None:
    """Print a warning for each kind of text that transformers encodes differently."""
    kind = tokenizer.identity["type"]
    if not (directory / "tokenizer_config.json").exists():
        print(f"no tokenizer files: transformers has none for a {kind}")
        return
    if not (directory / "tokenizer.json").exists():
        check.convert_tokenizer(directory)
    file = tokenizer_file(directory, kind)
    special = [] if file is None else texts_with_special_pieces(kind, file)
    for texts in (PROBES, special):
        if (text := check.tokenizer_difference(directory, tokenizer, texts)) is not None:
            print(f"warning: transformers encodes differently from megatron_tf with this tokenizer: {text[:40]!r}")
