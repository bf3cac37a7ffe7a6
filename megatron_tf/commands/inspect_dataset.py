"""Show and check a dataset: sizes, ids, and single documents or training samples, decoded if a tokenizer is given.

Of chat data it also shows which tokens are targets.

Examples:
    megatron-tf inspect-dataset data/pile_text_document --documents 0 1
    megatron-tf inspect-dataset data/pile_text_document --config run.yaml --samples 0 --tokenizer-type NullTokenizer
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_tf.commands.arguments import file_path, file_prefix, make_parser, parse, positive_int
from megatron_tf.commands.runner import command, import_late
from megatron_tf.data.bad_ids import first_bad_id
from megatron_tf.data.blend import Samples
from megatron_tf.data.gpt_dataset import GPTDataset, split_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.loss_mask import open_loss_mask
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.published import report_of
from megatron_tf.data.sample import Sample
from megatron_tf.data.tokenizer import TYPES, Tokenizer, build_tokenizer

BLOCK_TOKENS = 1 << 24
SHOWN_IDS = 40


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    prefix: str
    documents: list[int]
    samples: list[int]
    config: Path | None
    seq_length: int | None
    split: str | None
    seed: int | None
    tokenizer_type: str | None
    tokenizer_model: Path | None


@command()
def main(arguments: list[str] | None = None) -> int:
    """Print the sizes of the dataset, and the documents and samples selected by the options."""
    parser = make_parser("inspect-dataset", __doc__)
    add = parser.add_argument
    add("prefix", type=file_prefix, help="prefix of the .bin/.idx pair")
    add("--documents", type=int, nargs="*", default=[], metavar="I", help="indices of documents to print")
    add("--samples", type=int, nargs="*", default=[], metavar="I", help="indices of training samples to print")
    add("--config", type=file_path, help="YAML configuration of a run that reads the dataset; print the run's samples")
    add("--seq-length", type=positive_int, help="sequence length of samples without --config (default: 2048)")
    add("--split", help="data.split without --config; 1,0,0 selects all documents (default: 969,30,1)")
    add("--seed", type=int, help="random seed of the order of samples without --config (default: 1234)")
    add("--tokenizer-type", choices=TYPES, help="decode printed ids with a tokenizer of this type")
    add("--tokenizer-model", type=file_path, help="the tokenizer's file, for --tokenizer-type")
    options = parse(parser, Options, arguments)
    for name in ("seq_length", "split", "seed"):
        if options.config is not None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is that of the run with --config: leave it out")
    inspect(options)
    return 0


def inspect(options: Options) -> None:
    """Print the requested parts of a dataset. Raises DataError if it is damaged."""
    dataset = IndexedDataset(options.prefix)
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model) if options.tokenizer_type else None
    show_counts(dataset)
    check_id_range(dataset, tokenizer)
    mask = open_loss_mask(dataset, by_sequence=False)
    for index in options.documents:
        if not 0 <= index < len(dataset):
            raise DataError(f"--documents {index}: the dataset has {len(dataset):,}, counted from 0")
        counts = None if mask is None else mask.document(index) != 0
        show(f"document {index}", Sample(dataset.document(index), counts), tokenizer)
    if options.samples:
        with tempfile.TemporaryDirectory() as cache:
            samples, whole = samples_of(options, dataset, Path(cache))
            for index in options.samples:
                if index < 0:
                    raise DataError(f"--samples {index}: they are counted from 0")
                show(f"sample {index} of {whole}", samples.read(index), tokenizer)


def samples_of(options: Options, dataset: IndexedDataset, cache: Path) -> tuple[Samples, str]:
    """Return the training samples in the order in which a run reads them, and a name for them."""
    if options.config is not None:
        import_late("megatron_tf.training.run.resume")
        from megatron_tf.config import load_config
        from megatron_tf.data.build import training_prefixes
        from megatron_tf.training.run.resume import dataset_of_run

        config = load_config(options.config, [])
        prefixes = [Path(prefix) for _, prefix in training_prefixes(config.data)]
        if Path(options.prefix).resolve() not in [prefix.resolve() for prefix in prefixes]:
            read = ", ".join(map(str, prefixes))
            raise DataError(f"the run of --config {options.config} does not read {options.prefix}, but {read}")
        return dataset_of_run(config), f"the run of {options.config}"
    from megatron_tf.config import parse_split

    documents = split_documents(len(dataset), parse_split(options.split or "969,30,1", key="--split"))[0]
    lengths = dataset.document_lengths[documents.start : documents.stop]
    name = f"{dataset.prefix.name}:train"
    seed = 1234 if options.seed is None else options.seed
    order = SampleOrder(lengths, seq_length=options.seq_length or 2048, seed=seed, name=name, cache=cache)
    return GPTDataset(dataset, documents, order), f"{order.samples_per_epoch:,} an epoch, in data.order counter"


def show_counts(dataset: IndexedDataset) -> None:
    """Print the numbers of documents and tokens, length quantiles, and the report next to the data."""
    lengths = dataset.document_lengths
    print(f"{dataset.prefix}: {len(dataset):,} documents, {dataset.num_tokens:,} tokens of type {dataset.dtype}")
    if len(lengths):
        marks = np.percentile(lengths, [0, 25, 50, 75, 99, 100]).astype(np.int64)
        names = ("shortest", "25 %", "median", "75 %", "99 %", "longest")
        print("  tokens a document: " + ", ".join(f"{n} {m:,}" for n, m in zip(names, marks.tolist(), strict=True)))
        print(f"  empty documents: {int((lengths == 0).sum()):,}")
    content = report_of(dataset.prefix)
    if content is not None:
        tokenizer = content["tokenizer"]
        print(f"  made with {tokenizer['type']} of {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256']}")
        for name, counts in content.get("pile_sets", {}).items():
            print(f"  {name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")


def check_id_range(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> None:
    """Raise DataError if an id is outside the vocabulary."""
    total = dataset.num_tokens
    blocks = (dataset.ids(start, min(start + BLOCK_TOKENS, total)) for start in range(0, total, BLOCK_TOKENS))
    extremes = [(int(block.min()), int(block.max())) for block in blocks]
    lowest = min((low for low, _ in extremes), default=0)
    highest = max((high for _, high in extremes), default=0)
    print(f"  ids from {lowest:,} to {highest:,}")
    size = highest + 1 if tokenizer is None else tokenizer.vocab_size
    if lowest < 0 or highest >= size:
        document, offset, value = first_outside(dataset, size)
        of = "" if tokenizer is None else f" of {size:,}"
        raise DataError(
            f"{dataset.prefix}.bin holds ids from {lowest:,} to {highest:,}, outside the vocabulary{of}: document "
            f"{document:,} has id {value} at offset {offset:,}"
        )


def first_outside(dataset: IndexedDataset, vocab_size: int) -> tuple[int, int, int]:
    """Return (document, offset in it, id) of the first id outside the vocabulary; there must be one."""
    for document in range(len(dataset)):
        ids = dataset.document(document)
        bad = first_bad_id(ids, vocab_size)
        if bad is not None:
            return document, bad, int(ids[bad])
    raise AssertionError("no id is outside the vocabulary")


def show(name: str, sample: Sample, tokenizer: Tokenizer | None) -> None:
    """Print the first ids, and the text of all of them if there is a tokenizer; then the same of the targets."""
    ids, counts = sample.ids, sample.counts
    first = " ".join(map(str, ids[:SHOWN_IDS].tolist()))
    print(f"\n{name}, {len(ids):,} tokens: {first}{' ...' if len(ids) > SHOWN_IDS else ''}")
    if tokenizer is not None:
        print(tokenizer.decode(ids.tolist()))
    if counts is None:
        return
    edges = np.flatnonzero(np.diff(counts.astype(np.int8), prepend=0, append=0)).tolist()
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    print(f"  targets: {int(counts.sum()):,} of {len(ids):,} tokens, at {', '.join(f'{a}-{b - 1}' for a, b in spans)}")
    if tokenizer is not None:
        for start, stop in spans:
            print(f"  {tokenizer.decode(ids[start:stop].tolist())!r}")
