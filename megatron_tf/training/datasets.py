"""The configured data sets as batches for this replica."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_tf.config import ConfigError, RunConfig, TrainingConfig
from megatron_tf.data.blend import BlendedDataset, Samples
from megatron_tf.data.gpt_dataset import GPTDataset, split_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.megatron_order import MegatronOrder, samples_of_part
from megatron_tf.data.order import SampleOrder
from megatron_tf.data.order_cache import Order
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.parallel.mesh import Mesh

Split = Literal["train", "validation"]


def build_loader(
    dataset: Samples, training: TrainingConfig, mesh: Mesh, consumed_samples: int, is_training: bool = True
) -> BatchLoader:
    """This replica's batches of a data set from the given position on; of full size where they are not to train on."""
    return BatchLoader(
        dataset,
        training.batch_size_at if is_training else lambda _: training.global_batch_size,
        training.micro_batch_size,
        mesh.rank("dp"),
        mesh.size("dp"),
        consumed_samples,
    )


def build_dataset(config: RunConfig, split: Split) -> Samples:
    """One data set, or the blend of several. Raises DataError or ConfigError for data that can't be used."""
    whole = split == "validation" and config.data.valid_data_path is not None
    weights, prefixes = parse_data_path(config.data.valid_data_path or [] if whole else config.data.data_path)
    cache = config.data.data_cache_path or Path(prefixes[0]).parent / "cache"
    samples, training = samples_of_run(config.training, split), config.training
    datasets = []
    for weight, prefix in zip(weights, prefixes, strict=True):
        indexed = IndexedDataset(prefix)
        parts = split_documents(len(indexed), config.data.split)
        documents = range(len(indexed)) if whole else parts[0 if split == "train" else 1]
        lengths = indexed.document_lengths[documents.start : documents.stop]
        name = f"{Path(prefix).name}:{split}"
        order: Order
        if config.data.order == "megatron":
            asked = samples if len(prefixes) == 1 else samples_of_part(samples, weight, sum(weights))
            order = MegatronOrder(lengths, training.seq_length, training.seed, name, cache, asked)
        else:
            order = SampleOrder(lengths, training.seq_length, training.seed, name, cache)
        datasets.append(GPTDataset(indexed, documents, order))
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, weights)


def samples_of_run(training: TrainingConfig, split: Split) -> int:
    """Samples that Megatron-LM would prepare of a split for the whole run."""
    if split == "train":
        return training.samples_of(training.train_iters)
    evaluations = training.train_iters // training.eval_interval + 1 if training.eval_interval else 0
    return evaluations * training.eval_iters * training.global_batch_size


def parse_data_path(entries: Sequence[str]) -> tuple[list[float], list[str]]:
    """(weights, prefixes) of entries "PREFIX" or "WEIGHT PREFIX". Raises ConfigError for a mixture of both."""
    fields = [entry.split(maxsplit=1) for entry in entries]
    if all(len(field) == 1 for field in fields):
        return [1.0] * len(fields), [field[0] for field in fields]
    try:
        return [float(weight) for weight, _ in fields], [prefix for _, prefix in fields]
    except ValueError:
        raise ConfigError(
            f"data.data_path: write every entry as PREFIX, or every one as WEIGHT PREFIX: {entries}"
        ) from None


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise unless the model has a row for each id, and the data was made with this tokenizer, as its report says."""
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, the tokenizer {config.data.tokenizer_model or ''} has "
            f"{tokenizer.vocab_size} ids: set model.vocab_size to that"
        )
    for prefix in parse_data_path([*config.data.data_path, *(config.data.valid_data_path or [])])[1]:
        report = Path(f"{prefix}.json")
        if report.exists():
            made_with = json.loads(report.read_text()).get("tokenizer")
            if made_with != tokenizer.identity:
                raise DataError(
                    f"{prefix} was made with another tokenizer ({made_with}) than the configured one "
                    f"({tokenizer.identity}): name that one, or preprocess the data again"
                )
