"""Facts about documents that a .bin/.idx pair does not hold, in PREFIX.documents.npz: their sets and text sizes.

Arrays: `names` [sets]; `set` uint32 [documents], an index into them; `text_bytes` uint32 [documents], in UTF-8.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.files import sync_file

ROW = np.dtype([("set", "<u4"), ("text_bytes", "<u4")])


@dataclass(frozen=True)
class DocumentSets:
    """The set (such as a Pile subset) and the bytes of text of each document, in the order of the dataset."""

    names: list[str]
    rows: NDArray[np.void]
    """Structured array [documents] of type ROW."""

    def write(self, path: Path) -> None:
        """Write the file; equal contents give identical bytes."""
        with path.open("wb") as file:
            np.savez(file, names=np.array(self.names), set=self.rows["set"], text_bytes=self.rows["text_bytes"])
            sync_file(file)


def sets_path(prefix: str | Path) -> Path:
    """Return the path of the file for the dataset with this prefix."""
    return Path(f"{prefix}.documents.npz")


def read_document_sets(prefix: str | Path, num_documents: int) -> DocumentSets | None:
    """Read the file next to a dataset; None if it is missing.

    Raises DataError if it is damaged or has a different number of documents than the dataset.
    """
    path = sets_path(prefix)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["names"].tolist()
            sets = arrays["set"]
            text_bytes = arrays["text_bytes"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}): preprocess the data again, or remove it") from error
    if not len(sets) == len(text_bytes) == num_documents or (len(sets) and int(sets.max()) >= len(names)):
        raise DataError(f"{path} is not of these {num_documents:,} documents: preprocess the data again, or remove it")
    rows = np.empty(num_documents, ROW)
    rows["set"] = sets
    rows["text_bytes"] = text_bytes
    return DocumentSets(names, rows)


def joined_sets(parts: Sequence[DocumentSets]) -> DocumentSets:
    """Concatenate the documents of several datasets; names of sets are sorted."""
    names = sorted(set().union(*(part.names for part in parts)))
    place_of = {name: place for place, name in enumerate(names)}
    rows = [part.rows.copy() for part in parts]
    for part, own in zip(parts, rows, strict=True):
        # index of a set in one part -> its index among the names of all parts
        places = np.array([place_of[name] for name in part.names], np.uint32)
        own["set"] = places[own["set"]]
    return DocumentSets(names, np.concatenate(rows))
