"""Reads Hugging Face datasets as streams; their shards are distributed to ranks as files are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import xxhash
from datasets.distributed import split_dataset_by_node

from megatron_tf.data import documents
from megatron_tf.data.documents import BEGINNING, DocumentBatch, Fields, Position, checked, naming, text_of, utf8_size
from megatron_tf.data.indexed_dataset import DataError


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the Hugging Face Hub, or of a local directory that `datasets.load_dataset` reads."""

    path: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        """Name in messages."""
        config = "" if self.config is None else f", configuration {self.config}"
        return f"{self.path}{config}, split {self.split}"

    def identity(self) -> dict[str, Any]:
        """Return its names, and a digest of its files with their revision, or time of modification."""
        return {"input": self.path, "config": self.config, "split": self.split, "digest": self._loaded.digest}

    def sources(self, fields: Fields) -> Sequence["HubShard"]:
        """Return its shards, mostly one for each of its files. Raises DataError if the library can't open it."""
        count = self._loaded.rows.n_shards
        return [HubShard(self, index, count) for index in range(count)]

    def rows(self, index: int, count: int) -> Iterator[dict[str, Any]]:
        """Yield the rows of one of its shards. Raises DataError for whatever the library raises."""
        with _one_line(self.name):
            rows = iter(split_dataset_by_node(self._loaded.rows, rank=index, world_size=count))
        while True:
            with _one_line(self.name):
                row = next(rows, None)
            if row is None:
                return
            yield row

    @property
    def _loaded(self) -> "_Loaded":
        return _load(self)


@dataclass(frozen=True)
class HubShard:
    """One of the shards of a dataset."""

    dataset: HubDataset
    index: int
    count: int

    size = 0

    @property
    def name(self) -> str:
        """Name in messages."""
        return self.dataset.name if self.is_whole else f"{self.dataset.name}, shard {self.index}"

    @property
    def is_whole(self) -> bool:
        """Whether the dataset has no other shard."""
        return self.count == 1

    def identity(self) -> dict[str, Any]:
        """Return what identifies the dataset, and which of its shards this is."""
        return {**self.dataset.identity(), "shard": [self.index, self.count]}

    def batches(self, fields: Fields, start: Position = BEGINNING) -> Iterator[DocumentBatch]:
        """Yield the documents after a position: rows whose keys all hold text. Others count as bad.

        Raises DataError for whatever the library raises.
        """
        batch = DocumentBatch()
        for number, row in enumerate(self.dataset.rows(self.index, self.count), 1):
            batch.end_line = number
            if number <= start.rows:
                continue
            with naming(self.name, number):
                document = checked(dict(row), fields.keys, fields.chat)
            size = 0 if isinstance(document, str) else sum(utf8_size(text_of(document[key])) for key in fields.keys)
            if size > documents.MAX_LINE_BYTES:
                document = f"longer than {documents.MAX_LINE_BYTES >> 20} MiB"
            batch.count(document, path=self.name, line=number, size=size)
            if batch.line_bytes >= documents.BATCH_BYTES:
                yield batch
                batch = DocumentBatch(end_line=number)
        yield batch


@dataclass(frozen=True)
class _Loaded:
    rows: datasets.IterableDataset
    digest: str


@cache
def _load(dataset: HubDataset) -> _Loaded:
    """Open a dataset, once in a process. Raises DataError if the library can't."""
    saved = Path(dataset.path)
    if (saved / "state.json").exists() or (saved / "dataset_dict.json").exists():
        files = saved / "*.arrow" if (saved / "state.json").exists() else saved / dataset.split / "*.arrow"
        raise DataError(f"{saved} was written by save_to_disk: read its files with --input '{files}'")
    with _one_line(dataset.name):
        builder = datasets.load_dataset_builder(dataset.path, dataset.config)
        rows = builder.as_streaming_dataset(split=dataset.split)
    files = (builder.config.data_files or {}).get(dataset.split, [])
    identity = [builder.hash, list(map(str, files)), getattr(files, "origin_metadata", None)]
    return _Loaded(rows, xxhash.xxh3_128_hexdigest(repr(identity).encode()))


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Raise DataError for any error within the context: the library and what it is built on raise many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(f"--hf-dataset {name}: {type(error).__name__}: {reason}") from error
