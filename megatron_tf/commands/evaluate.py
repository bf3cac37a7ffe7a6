"""Measure perplexity and bits per byte of a model on datasets, in total and per Pile subset.

Each document is scored separately, after an end-of-document token, in windows of the training sequence length. Of chat
data, only the answers count.
For the tasks of lm-evaluation-harness, use megatron-tf lm-eval.

Example:
    megatron-tf evaluate runs/small --data-path data/pile_text_document --split 969,30,1 --part test
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.commands.arguments import file_path, make_folder_of, make_parser, parse
from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from megatron_tf.data.indexed_dataset import IndexedDataset

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    checkpoint: Path
    data_path: list[str]
    split: str | None
    part: str | None
    all_tokens: bool
    seq_length: int | None
    stride: int | None
    batch_size: int | None
    tokenizer_model: Path | None
    device: str | None
    output: Path | None


@command(less_memory="lower --batch-size or --seq-length")
def main(arguments: list[str] | None = None) -> int:
    """Evaluate the checkpoint and print a table of results."""
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("checkpoint", type=file_path, help="checkpoint, or directory of a run, whose newest one is used")
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help="prefixes of .bin/.idx pairs")
    add(
        "--split",
        metavar="SHARES",
        help="shares of training, validation and test, such as 969,30,1 (default: all data)",
    )
    add("--part", choices=PARTS, help="part of --split to evaluate on (default: test)")
    add("--all-tokens", action="store_true", help="count all tokens of chat data, not only its answers")
    add("--seq-length", type=int, help="window length in tokens (default: the run's training.seq_length)")
    add("--stride", type=int, help="new tokens per window; fewer give each more context (default: no overlap)")
    add("--batch-size", type=int, help="number of windows per batch (default: depends on their length)")
    add("--tokenizer-model", type=file_path, help="the tokenizer's file, if it has moved since training")
    add("--device", help="PyTorch device to run on, such as cpu or cuda:1 (default: the first GPU, if there is one)")
    add("--output", type=file_path, metavar="FILE", help="also write the results to this file as JSON")
    options = parse(parser, Options, arguments)
    if options.part is not None and options.split is None:
        parser.error(f"--part {options.part} is a part of --split, which is not given: for example 969,30,1")
    for name in ("seq_length", "stride", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")
    if options.output is not None:
        from megatron_tf.checkpoint.destination import check_outside_checkpoints

        check_outside_checkpoints(options.output, "--output")
        make_folder_of(options.output)
    result = evaluate(options)
    print(table(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def evaluate(options: Options) -> dict[str, Any]:
    """Evaluate and return the results as JSON values. Raises UserError for what a user can fix."""
    import_late("torch")  # imported here so that --help is fast
    from tqdm import tqdm

    from megatron_tf.config import parse_split
    from megatron_tf.data.indexed_dataset import IndexedDataset
    from megatron_tf.data.loss_mask import open_loss_mask
    from megatron_tf.inference.model import default_device, load_model
    from megatron_tf.inference.perplexity import Prediction, predict_documents, read_tokenized
    from megatron_tf.inference.tokenizer import load_tokenizer
    from megatron_tf.model.samples import check_made_with

    shares = None if options.split is None else parse_split(options.split, key="--split")
    part = options.part or "test"
    datasets = [IndexedDataset(prefix) for prefix in options.data_path]
    model = load_model(options.checkpoint, device=options.device or default_device())
    for dataset in datasets:
        check_made_with(dataset.prefix, model.record.tokenizer)
    tokenizer = load_tokenizer(model, options.tokenizer_model)
    window = options.seq_length or model.record.seq_length
    stride = options.stride or window
    predictions: dict[str, Prediction] = {}
    for dataset in datasets:
        documents = _documents_of(dataset, shares, part)
        tokens = int(dataset.document_lengths[documents.start : documents.stop].sum())
        interval = 0.1 if sys.stderr.isatty() else 30
        with tqdm(total=tokens, unit="tok", unit_scale=True, desc=dataset.prefix.name, mininterval=interval) as bar:
            mask = None if options.all_tokens else open_loss_mask(dataset, by_sequence=False)
            vocab_size = model.config.vocab_size
            read = read_tokenized(dataset, documents, mask=mask, tokenizer=tokenizer, vocab_size=vocab_size)
            found = predict_documents(
                model,
                read,
                eod=tokenizer.eod,
                window=window,
                stride=stride,
                batch_size=options.batch_size,
                progress=bar.update,
            )
        for name, prediction in found.items():
            predictions.setdefault(name, Prediction()).add(prediction)
    whole = Prediction()
    for prediction in predictions.values():
        whole.add(prediction)
    if not whole.tokens:
        where = "" if shares is None else f"the {part} part of --split {options.split} of "
        raise UserError(f"{where}{', '.join(options.data_path)} holds no token to predict")
    return {
        "checkpoint": str(options.checkpoint),
        "training": model.record.to_json()["training"],
        "data_path": options.data_path,
        "split": options.split,
        "part": None if shares is None else part,
        "all_tokens": options.all_tokens,
        "seq_length": window,
        "stride": stride,
        "sets": {name: predictions[name].summary() for name in sorted(predictions)},
        "all": whole.summary(),
    }


def _documents_of(dataset: "IndexedDataset", shares: Sequence[float] | None, part: str) -> range:
    from megatron_tf.data.gpt_dataset import split_documents

    if shares is None:
        return range(len(dataset))
    return split_documents(len(dataset), shares)[PARTS.index(part)]


def table(result: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        f"{'set':<24}{'documents':>12}{'tokens':>14}{'bytes':>16}{'nats/token':>12}{'perplexity':>12}{'bits/byte':>11}"
    ]
    for name, figures in [*result["sets"].items(), ("all", result["all"])]:
        counts = f"{figures['documents']:>12,}{figures['tokens']:>14,}{figures['text_bytes']:>16,}"
        ratios = [figures[key] for key in ("nats_per_token", "perplexity", "bits_per_byte")]
        shown = ["-" if ratio is None else f"{ratio:.4f}" for ratio in ratios]
        rows.append(f"{name:<24}{counts}{shown[0]:>12}{shown[1]:>12}{shown[2]:>11}")
    return "\n".join(rows)
