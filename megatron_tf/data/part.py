"""The tokens of one source before they are assembled into datasets: growing files, and a journal of commits.

Committed data survives a crash at any point; anything after the last commit is truncated when the part is reopened.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.document_sets import ROW, DocumentSets
from megatron_tf.data.documents import BadLines, Position
from megatron_tf.data.output_names import file_stem
from megatron_tf.files import replace_durably, sync_file

MAX_OPEN_OUTPUTS = 64  # outputs, of three files each: many systems allow 1,024 open files, some 256


@dataclass
class Tally:
    """Number of documents, tokens and bytes of text."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, more: "Tally") -> None:
        """Add the counts of `more`."""
        self.documents += more.documents
        self.tokens += more.tokens
        self.text_bytes += more.text_bytes


@dataclass
class Journal:
    """The state of a part at its last commit."""

    identity: dict[str, Any]
    """The input and everything else that determines the contents of the part."""
    lines: int = 0
    digest: str | None = None
    """Digest of these lines, if the source has one."""
    is_complete: bool = False
    counts: dict[str, dict[str, Tally]] = field(default_factory=dict)
    """Output -> pile_set_name -> counts of what was written."""
    bad: BadLines = field(default_factory=BadLines)
    without_set: int = 0
    """Number of documents without the key that the outputs are split by."""

    def count(self, output: str, set_name: str) -> Tally:
        """Return the (mutable) tally of an output and a set; it is created if necessary."""
        return self.counts.setdefault(output, {}).setdefault(set_name, Tally())

    def total(self, output: str) -> Tally:
        """Return the sum over all sets of one output."""
        total = Tally()
        for count in self.counts.get(output, {}).values():
            total.add(count)
        return total

    @property
    def end(self) -> Position:
        """Return the place in the source up to which it has been read."""
        return Position(self.lines, self.digest)

    @property
    def num_documents(self) -> int:
        """Return the documents of all outputs together; a line with two keys counts twice."""
        return sum(self.total(output).documents for output in self.counts)

    @classmethod
    def read(cls, path: Path) -> "Journal | None":
        """Read a journal; None if the file is missing or malformed."""
        try:
            fields = json.loads(path.read_text())
            bad = BadLines(**fields["bad"])
            journal = cls(fields["identity"], fields["lines"], fields.get("digest"), fields["is_complete"], bad=bad)
            journal.without_set = fields["without_set"]
            for output, sets in fields["counts"].items():
                for name, count in sets.items():
                    journal.counts.setdefault(output, {})[name] = Tally(**count)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return journal

    def write(self, path: Path) -> None:
        """Replace the file atomically."""
        replace_durably(path, json.dumps(asdict(self)))


class Part:
    """The files `stem`-OUTPUT.bin, .lengths (int32 a document) and .sets (ROW a document) and their journal, open for
    appending; with `has_mask` also .mask (uint8 an id).

    A part with another identity, or without all the data in its journal, starts from scratch.
    """

    def __init__(self, stem: Path, identity: dict[str, Any], dtype: np.dtype, has_mask: bool = False) -> None:
        self.stem = stem
        self.dtype = dtype
        self.has_mask = has_mask
        self._path = stem.with_name(stem.name + ".json")
        journal = Journal.read(self._path)
        is_usable = journal is not None and journal.identity == identity and self._holds(journal)
        self.journal = journal if journal is not None and is_usable else Journal(identity)
        self._files: OrderedDict[str, list[BinaryIO]] = OrderedDict()
        self._written: set[str] = set()  # outputs written to since the last commit

    def append(
        self,
        output: str,
        ids: NDArray[np.generic],
        documents: Sequence[tuple[str, int, int]],
        mask: NDArray[np.integer] | None = None,
    ) -> None:
        """Append documents to an output and count them in the journal.

        `ids` are concatenated; each document has a row (set, number of ids, bytes of text). `mask`, which a part that
        `has_mask` needs, is that of the ids.
        """
        # open before counting, since this truncates the files to what the journal counts
        files = self._opened(output)
        for name, length, text_bytes in documents:
            self.journal.count(output, name).add(Tally(1, length, text_bytes))
        # in order of first appearance, which JSON preserves: rows written before a resume still refer to their sets
        places = {name: place for place, name in enumerate(self.journal.counts[output])}
        rows = np.array([(places[name], text_bytes) for name, _, text_bytes in documents], ROW)
        lengths = np.array([length for _, length, _ in documents], "<i4")
        columns = [ids.astype(self.dtype, copy=False), lengths, rows, *([] if mask is None else [mask])]
        for file, values in zip(files, columns, strict=True):
            file.write(values.tobytes())

    def document_sets(self, output: str) -> DocumentSets:
        """Return the sets of an output's committed documents."""
        return DocumentSets(list(self.journal.counts[output]), np.fromfile(self.paths(output)[2], ROW))

    def commit(self, is_complete: bool = False) -> None:
        """Make everything appended so far durable."""
        # the journal last, so that it never claims more than the files hold; any excess is truncated later
        for output in sorted(self._written):
            for file in self._opened(output):
                sync_file(file)  # includes what was written through another descriptor
        self._written.clear()
        self.journal.is_complete = is_complete
        self.journal.write(self._path)

    def paths(self, output: str) -> tuple[Path, ...]:
        """Return the paths of the .bin, .lengths and .sets files of an output, and of its .mask, if any."""
        kinds = ("bin", "lengths", "sets", "mask") if self.has_mask else ("bin", "lengths", "sets")
        return tuple(self.stem.with_name(f"{self.stem.name}-{file_stem(output)}.{kind}") for kind in kinds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for files in self._files.values():
            for file in files:
                file.close()

    def _sizes(self, journal: Journal, output: str) -> tuple[int, ...]:
        total = journal.total(output)
        sizes = total.tokens * self.dtype.itemsize, 4 * total.documents, ROW.itemsize * total.documents
        return (*sizes, total.tokens) if self.has_mask else sizes

    def _holds(self, journal: Journal) -> bool:
        for output in journal.counts:
            for path, size in zip(self.paths(output), self._sizes(journal, output), strict=True):
                if not path.is_file() or path.stat().st_size < size:
                    return False
        return True

    def _opened(self, output: str) -> list[BinaryIO]:
        """Return the open files of an output; only a bounded number of outputs is open at a time."""
        if output not in self._files:
            while len(self._files) >= MAX_OPEN_OUTPUTS:
                for file in self._files.popitem(last=False)[1]:
                    file.close()
            self._files[output] = self._open(output)
        self._files.move_to_end(output)
        self._written.add(output)
        return self._files[output]

    def _open(self, output: str) -> list[BinaryIO]:
        opened: list[BinaryIO] = []
        sizes = self._sizes(self.journal, output)
        for path, size in zip(self.paths(output), sizes, strict=True):
            # reopened after it was closed to free descriptors: keep what is counted but not committed yet
            file = path.open("ab")
            file.truncate(size)
            opened.append(file)
        return opened
