"""Tokens of one input file on their way into a data set: files that grow, and a journal that says how far they hold.

What a commit covers survives anything; what comes after it is cut off when the part is opened again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.document_sets import ROW, DocumentSets
from megatron_tf.data.documents import BadLines


@dataclass
class Count:
    """How much there is of something."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Count more."""
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes


@dataclass
class Journal:
    """What a commit covers."""

    identity: dict[str, Any]
    """The input, and everything else that decides the bytes."""
    lines: int = 0
    is_complete: bool = False
    counts: dict[str, dict[str, Count]] = field(default_factory=dict)
    """Output -> pile_set_name -> what went there."""
    bad: BadLines = field(default_factory=BadLines)

    def count(self, output: str, set_name: str) -> Count:
        """Where to count what goes to an output from a set."""
        return self.counts.setdefault(output, {}).setdefault(set_name, Count())

    def total(self, output: str) -> Count:
        """All sets of one output."""
        total = Count()
        for count in self.counts.get(output, {}).values():
            total.add(count.documents, count.tokens, count.text_bytes)
        return total

    @classmethod
    def read(cls, path: Path) -> "Journal | None":
        """The journal in a file, None where there is none that can be read."""
        try:
            fields = json.loads(path.read_text())
            journal = cls(fields["identity"], fields["lines"], fields["is_complete"], bad=BadLines(**fields["bad"]))
            for output, sets in fields["counts"].items():
                for name, count in sets.items():
                    journal.counts.setdefault(output, {})[name] = Count(**count)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return journal

    def write(self, path: Path) -> None:
        """Replace the file, whole or not at all."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Part:
    """The files `stem`-OUTPUT.bin, .lengths (int32 a document) and .sets (ROW a document) and their journal, open for
    appending.

    A part of another identity, or one that does not hold what its journal says, is started anew.
    """

    def __init__(self, stem: Path, identity: dict[str, Any], dtype: np.dtype) -> None:
        self.stem, self.dtype = stem, dtype
        self._path = stem.with_name(stem.name + ".json")
        journal = Journal.read(self._path)
        is_usable = journal is not None and journal.identity == identity and self._holds(journal)
        self.journal = journal if journal is not None and is_usable else Journal(identity)
        self._files: dict[str, list[BinaryIO]] = {}

    def append(self, output: str, ids: NDArray[np.generic], documents: Sequence[tuple[str, int, int]]) -> None:
        """Documents of one output, ids end to end, and (set, ids, bytes of text) of each; counted in the journal."""
        if output not in self._files:
            self._files[output] = self._open(output)
        for name, length, text_bytes in documents:
            self.journal.count(output, name).add(1, length, text_bytes)
        places = {name: place for place, name in enumerate(self.journal.counts[output])}
        rows = np.array([(places[name], text_bytes) for name, _, text_bytes in documents], ROW)
        lengths = np.array([length for _, length, _ in documents], "<i4")
        for file, values in zip(self._files[output], (ids.astype(self.dtype, copy=False), lengths, rows), strict=True):
            file.write(values.tobytes())

    def document_sets(self, output: str) -> DocumentSets:
        """The sets of an output's documents, as far as they are committed."""
        return DocumentSets(list(self.journal.counts[output]), np.fromfile(self.paths(output)[2], ROW))

    def commit(self, is_complete: bool = False) -> None:
        """Make everything so far last."""
        for files in self._files.values():
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        self.journal.is_complete = is_complete
        self.journal.write(self._path)

    def paths(self, output: str) -> tuple[Path, ...]:
        """The .bin, the .lengths and the .sets of an output."""
        return tuple(self.stem.with_name(f"{self.stem.name}-{output}.{kind}") for kind in ("bin", "lengths", "sets"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for files in self._files.values():
            for file in files:
                file.close()

    def _sizes(self, journal: Journal, output: str) -> tuple[int, int, int]:
        total = journal.total(output)
        return total.tokens * self.dtype.itemsize, 4 * total.documents, ROW.itemsize * total.documents

    def _holds(self, journal: Journal) -> bool:
        return all(
            path.is_file() and path.stat().st_size >= size
            for output in journal.counts
            for path, size in zip(self.paths(output), self._sizes(journal, output), strict=True)
        )

    def _open(self, output: str) -> list[BinaryIO]:
        opened: list[BinaryIO] = []
        for path, size in zip(self.paths(output), self._sizes(self.journal, output), strict=True):
            file = path.open("ab")
            file.truncate(size)
            opened.append(file)
        return opened
