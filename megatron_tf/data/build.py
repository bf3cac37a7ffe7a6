"""Builds the configured datasets and the loaders of their batches for a data-parallel rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tf.config import ConfigError, DataConfig, RunConfig, TrainingConfig, parse_data_path, parse_split
from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.blend import GREEDY, SPACED, Blend, BlendedDataset, GreedyBlend, Samples, SpacedBlend
from megatron_tf.data.gpt_dataset import GPTDataset, split_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.lane_samples import LaneSamples, lane_samples
from megatron_tf.data.lane_set import LaneSet
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.loss_mask import check_loss_mask, open_loss_mask
from megatron_tf.data.megatron_order import MegatronOrder, normalized, samples_of_parts, split_sequences
from megatron_tf.data.order import SampleOrder, samples_in
from megatron_tf.data.order_cache import Order
from megatron_tf.data.packed_dataset import PackedDataset
from megatron_tf.data.packed_order import PackedOrder
from megatron_tf.data.published import report_of
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.parallel.mesh import Mesh

Split = Literal["train", "validation"]
_Ordered = GPTDataset | PackedDataset

_LOOKED_AT = 256  # documents


def build_loader(
    dataset: Samples,
    *,
    training: TrainingConfig,
    mesh: Mesh,
    masking: DocumentMasking,
    consumed_samples: int = 0,
    is_training: bool = True,
) -> BatchLoader:
    """Build the loader of this data-parallel rank's batches, starting at a position in the dataset.

    Batch sizes follow the ramp-up for training data; for evaluation they have full size.
    """
    return BatchLoader(
        dataset,
        batch_size=training.batch_size_at if is_training else lambda _: training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        replica=mesh.rank("dp"),
        replicas=mesh.size("dp"),
        consumed_samples=consumed_samples,
        masking=masking,
        device=mesh.device,
    )


def build_dataset(config: RunConfig, blend: str = SPACED, phase: Mapping[str, Any] | None = None) -> Samples:
    """Build the training data: one dataset, or a blend of several.

    `blend` names its order under data.order counter, `phase` is what `open_phase` returned under data.order lanes.
    Raises DataError or ConfigError for data that can't be used, and for the blend of a later version.
    """
    entries = config.data.data_path
    weights, prefixes = parse_data_path(entries)
    _check_positive(weights, prefixes)
    if config.data.order_of_new_run == "lanes":
        return _build_lanes(config, sample=0, saved=phase)
    cache, requested = _cache(config, prefixes), samples_of_run(config.training, "train")
    datasets = [
        _open(config, prefix, "train", requested=share, cache=cache)
        for prefix, share in zip(prefixes, _samples_to_prepare(config, entries, requested), strict=True)
    ]
    if len(datasets) == 1:
        return datasets[0]
    if config.data.order_of_new_run != "megatron":
        return BlendedDataset(datasets, _blend(blend, weights))
    weights = normalized(weights) if _has_weights(entries) else _sizes(config, datasets, requested)
    return BlendedDataset(datasets, GreedyBlend(normalized(weights), are_shares=True))


def open_phase(config: RunConfig, *, sample: int, saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the phase of the training data for samples from `sample` on, as JSON values; None unless data.order is
    lanes.

    It is the `saved` one of a checkpoint if the configuration still reads the same data. Raises like `build_dataset`.
    """
    is_lanes = config.data.order_of_new_run == "lanes"
    return _build_lanes(config, sample=sample, saved=saved).phase.to_json() if is_lanes else None


def _build_lanes(config: RunConfig, *, sample: int, saved: Mapping[str, Any] | None) -> LaneSamples:
    weights, prefixes = parse_data_path(config.data.data_path)
    sets = []
    for prefix in prefixes:
        indexed = _indexed(config, prefix, "data_path")
        documents = split_documents(len(indexed), parse_split(config.data.split))[0]
        sets.append(LaneSet(indexed, documents, seed=config.training.seed, mask=_mask(config, indexed)))
    return lane_samples(sets, weights, seq_length=config.training.seq_length, sample=sample, saved=saved)


def _blend(name: str, weights: Sequence[float]) -> Blend:
    if name == SPACED:
        return SpacedBlend(weights)
    if name == GREEDY:
        return GreedyBlend(weights)
    raise DataError(f"the checkpoint blends its datasets in the order {name!r}, which this version does not support")


def _check_positive(weights: Sequence[float], prefixes: Sequence[str]) -> None:
    """Raise ConfigError for a dataset with weight 0, which would never be read."""
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not weight:
            raise ConfigError(f"data.data_path: the weight of {prefix} is 0: remove it, or give it a positive weight")


def _has_weights(entries: Sequence[str]) -> bool:
    return len(entries[0].split(maxsplit=1)) == 2


def _samples_to_prepare(config: RunConfig, entries: Sequence[str], requested: int) -> list[int | None]:
    """Return how many samples Megatron-LM prepares of each dataset for a run of `requested`; None means one epoch."""
    weights, prefixes = parse_data_path(entries)
    # it treats a single dataset with a weight as a blend, unless each split has its own list of datasets
    is_plain = not _has_weights(entries) or config.data.valid_data_path is not None
    if len(prefixes) == 1 and is_plain:
        return [requested]
    return [*samples_of_parts(requested, weights)] if _has_weights(entries) else [None] * len(prefixes)


def _sizes(config: RunConfig, datasets: Sequence[_Ordered], requested: int) -> list[float]:
    """Return the samples in an epoch of each dataset, which Megatron-LM uses as weights if none are given.

    Raises ConfigError if the run needs more samples than that: Megatron-LM would then run out of data.
    """
    length = config.training.seq_length
    sizes = [float(samples_in(data.order.lengths, length, data.dataset.prefix.name)) for data in datasets]
    if requested > sum(sizes):
        raise ConfigError(
            f"data.data_path: the run needs {requested:,} samples, but its datasets have {int(sum(sizes)):,} in one "
            f"epoch; Megatron-LM reads datasets without weights only once: write every entry as WEIGHT PREFIX"
        )
    return sizes


@dataclass(frozen=True)
class ValidationSet:
    """One validation dataset."""

    name: str
    weight: float
    """Weight of its loss in the total validation loss."""
    samples: Samples


def build_validation(config: RunConfig) -> list[ValidationSet]:
    """Build the validation datasets, one for each prefix. Raises DataError or ConfigError for unusable data."""
    entries = config.data.valid_data_path or config.data.data_path
    weights, prefixes = parse_data_path(entries)
    requested: int | None = samples_of_run(config.training, "validation")
    if len(entries) == 1:  # of several each is evaluated on its own
        (requested,) = _samples_to_prepare(config, entries, samples_of_run(config.training, "validation"))
    cache, names = _cache(config, prefixes), [Path(prefix).name for prefix in prefixes]
    return [
        ValidationSet(
            name if names.count(name) == 1 else prefix,
            weight / sum(weights),
            _open(config, prefix, "validation", requested=requested, cache=cache),
        )
        for name, prefix, weight in zip(names, prefixes, weights, strict=True)
    ]


def _cache(config: RunConfig, prefixes: Sequence[str]) -> Path:
    return config.data.data_cache_path or Path(prefixes[0]).parent / "cache"


def _open(config: RunConfig, prefix: str, split: Split, *, requested: int | None, cache: Path) -> _Ordered:
    """Open the documents of a split in their order; `requested` is the number of samples that Megatron-LM would
    prepare, None for one epoch.

    Raises DataError or OSError naming the configuration key of data that can't be used.
    """
    is_valid = split == "validation" and config.data.valid_data_path is not None
    indexed = _indexed(config, prefix, "valid_data_path" if is_valid else "data_path")
    try:
        return _ordered(config, indexed, split, requested=requested, cache=cache)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"data.data_cache_path {cache} is not a directory: {error}") from error


def _indexed(config: RunConfig, prefix: str, key: str) -> IndexedDataset:
    try:
        return IndexedDataset(prefix, by_sequence=config.data.order_of_new_run == "megatron")
    except DataError as error:
        raise DataError(f"data.{key}: {error}") from error


def _ordered(
    config: RunConfig, indexed: IndexedDataset, split: Split, *, requested: int | None, cache: Path
) -> _Ordered:
    training, is_megatron = config.training, config.data.order_of_new_run == "megatron"
    divide = split_sequences if is_megatron else split_documents
    if split == "validation" and config.data.valid_data_path is not None:
        documents = range(len(indexed))
    else:
        documents = divide(len(indexed), parse_split(config.data.split))[0 if split == "train" else 1]
    lengths = indexed.document_lengths[documents.start : documents.stop]
    name, mask = f"{indexed.prefix.name}:{split}", _mask(config, indexed)
    if config.data.packing == "best_fit" and split == "train":
        packed = PackedOrder(lengths, seq_length=training.seq_length, seed=training.seed, name=name, cache=cache)
        return PackedDataset(indexed, documents, order=packed, mask=mask)
    order: Order
    if is_megatron:
        order = MegatronOrder(
            lengths, seq_length=training.seq_length, seed=training.seed, name=name, cache=cache, samples=requested
        )
    else:
        order = SampleOrder(lengths, seq_length=training.seq_length, seed=training.seed, name=name, cache=cache)
    return GPTDataset(indexed, documents, order=order, mask=mask)


def _mask(config: RunConfig, indexed: IndexedDataset) -> IndexedDataset | None:
    """Open the loss mask of a dataset, if it has one and the run uses it. Raises DataError for a wrong one."""
    return (
        open_loss_mask(indexed, by_sequence=config.data.order_of_new_run == "megatron")
        if config.data.loss_mask
        else None
    )


def samples_of_run(training: TrainingConfig, split: Split) -> int:
    """Return the number of samples of a split that Megatron-LM would prepare for the whole run."""
    if split == "train":
        return training.samples_of(training.train_iters)
    evaluations = training.train_iters // training.eval_interval + 1 if training.eval_interval else 0
    return evaluations * training.eval_iters * training.global_batch_size


def training_prefixes(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yield (the key that names it, prefix) of each training set of a run, over all phases of its data."""
    lists = {"data.data_path": data.data_path}
    lists |= {f"data.phases[{i}].data_path": phase.data_path or [] for i, phase in enumerate(data.phases)}
    seen: set[str] = set()
    for key, entries in lists.items():
        for prefix in parse_data_path(entries)[1]:
            if prefix not in seen:
                seen.add(prefix)
                yield key, prefix


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError unless the vocabulary size matches, DataError unless the data's report names this tokenizer."""
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer {config.data.tokenizer_model or ''} has "
            f"{tokenizer.vocab_size} ids: set model.vocab_size to that"
        )
    validation = parse_data_path(config.data.valid_data_path or [])[1]
    prefixes = [*(prefix for _, prefix in training_prefixes(config.data)), *validation]
    check_loss_mask(config.data.loss_mask, prefixes)
    for prefix in prefixes:
        if config.data.eod_mask_loss or config.data.reset_attention_mask or config.data.packing == "best_fit":
            _check_ends(IndexedDataset(prefix), tokenizer.eod)
        report = report_of(prefix)
        if report is not None:
            made_with, eod = report["tokenizer"], report.get("eod")
            if eod not in (None, tokenizer.eod):
                raise DataError(
                    f"{prefix}: documents end with id {eod}, but the configured tokenizer's end is {tokenizer.eod}: "
                    f"set data.eod_token to the token of id {eod}, or preprocess the data again"
                )
            if made_with != tokenizer.identity:
                raise DataError(
                    f"{prefix} was made with another tokenizer ({made_with}) than the configured one "
                    f"({tokenizer.identity}): configure that tokenizer, or preprocess the data again"
                )


def _check_ends(dataset: IndexedDataset, eod: int) -> None:
    """Raise DataError if documents do not end with `eod`: no boundaries would be found between them."""
    documents = [dataset.document(i) for i in range(min(len(dataset), _LOOKED_AT))]
    if any(len(ids) for ids in documents) and not any((ids == eod).any() for ids in documents):
        last = next(int(ids[-1]) for ids in documents if len(ids))
        raise DataError(
            f"{dataset.prefix}: none of its first documents has the end-of-document id {eod}, the first ends with "
            f"{last}: preprocess it with --append-eod, name that token with data.eod_token, or set "
            f"data.eod_mask_loss and data.reset_attention_mask to false and data.packing to concatenate"
        )
