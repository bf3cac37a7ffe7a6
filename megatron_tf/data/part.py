"""Tokens of one input file on their way into a dataset: files that grow, and a journal that says how far they hold.

What a commit covers survives anything; what comes after it is cut off when the part is opened again.
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
from megatron_tf.data.documents import BadLines
from megatron_tf.data.output_names import file_stem
from megatron_tf.files import replace_durably, sync_file

MAX_OPEN_OUTPUTS = 64  # of three files each: many systems allow 1,024 files, some 256


@dataclass
class Tally:
    """How much there is of something."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, more: "Tally") -> None:
        """Count what `more` holds too."""
        self.documents += more.documents
        self.tokens += more.tokens
        self.text_bytes += more.text_bytes


@dataclass
class Journal:
    """What a commit covers."""

    identity: dict[str, Any]
    """The input, and everything else that decides the bytes."""
    lines: int = 0
    is_complete: bool = False
    counts: dict[str, dict[str, Tally]] = field(default_factory=dict)
    """Output -> pile_set_name -> what went there."""
    bad: BadLines = field(default_factory=BadLines)
    without_set: int = 0
    """Documents without the key that the outputs are split by."""

    def count(self, output: str, set_name: str) -> Tally:
        """Where to count what goes to an output from a set."""
        return self.counts.setdefault(output, {}).setdefault(set_name, Tally())

    def total(self, output: str) -> Tally:
        """All sets of one output."""
        total = Tally()
        for count in self.counts.get(output, {}).values():
            total.add(count)
        return total

    @property
    def num_documents(self) -> int:
        """Documents of all outputs: a line with two keys gives two."""
        return sum(self.total(output).documents for output in self.counts)

    @classmethod
    def read(cls, path: Path) -> "Journal | None":
        """The journal in a file, None where there is none that can be read."""
        try:
            fields = json.loads(path.read_text())
            bad = BadLines(**fields["bad"])
            journal = cls(fields["identity"], fields["lines"], fields["is_complete"], bad=bad)
            journal.without_set = fields["without_set"]
            for output, sets in fields["counts"].items():
                for name, count in sets.items():
                    journal.counts.setdefault(output, {})[name] = Tally(**count)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return journal

    def write(self, path: Path) -> None:
        """Replace the file, whole or not at all."""
        replace_durably(path, json.dumps(asdict(self)))


class Part:
    """The files `stem`-OUTPUT.bin, .lengths (int32 a document) and .sets (ROW a document) and their journal, open for
    appending.

    A part of another identity, or one that does not hold what its journal says, starts from scratch.
    """

    def __init__(self, stem: Path, identity: dict[str, Any], dtype: np.dtype) -> None:
        self.stem = stem
        self.dtype = dtype
        self._path = stem.with_name(stem.name + ".json")
        journal = Journal.read(self._path)
        is_usable = journal is not None and journal.identity == identity and self._holds(journal)
        self.journal = journal if journal is not None and is_usable else Journal(identity)
        self._files: OrderedDict[str, list[BinaryIO]] = OrderedDict()
        self._written: set[str] = set()  # outputs written to since the last commit

    def append(self, output: str, ids: NDArray[np.generic], documents: Sequence[tuple[str, int, int]]) -> None:
        """Documents of one output, ids end to end, and (set, ids, bytes of text) of each; counted in the journal."""
        # before anything is counted: opening cuts files to what the journal counts
        files = self._opened(output)
        for name, length, text_bytes in documents:
            self.journal.count(output, name).add(Tally(1, length, text_bytes))
        # by first appearance, an order that JSON keeps: rows written before a resume still point to their sets
        places = {name: place for place, name in enumerate(self.journal.counts[output])}
        rows = np.array([(places[name], text_bytes) for name, _, text_bytes in documents], ROW)
        lengths = np.array([length for _, length, _ in documents], "<i4")
        for file, values in zip(files, (ids.astype(self.dtype, copy=False), lengths, rows), strict=True):
            file.write(values.tobytes())

    def document_sets(self, output: str) -> DocumentSets:
        """The sets of an output's documents, as far as they are committed."""
        return DocumentSets(list(self.journal.counts[output]), np.fromfile(self.paths(output)[2], ROW))

    def commit(self, is_complete: bool = False) -> None:
        """Make everything so far last."""
        # the journal last: it never claims more than the files hold, and what they hold beyond it is cut off
        for output in sorted(self._written):
            for file in self._opened(output):
                sync_file(file)  # what was written through another descriptor too
        self._written.clear()
        self.journal.is_complete = is_complete
        self.journal.write(self._path)

    def paths(self, output: str) -> tuple[Path, ...]:
        """The .bin, the .lengths and the .sets of an output."""
        return tuple(
            self.stem.with_name(f"{self.stem.name}-{file_stem(output)}.{kind}") for kind in ("bin", "lengths", "sets")
        )

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
        for output in journal.counts:
            for path, size in zip(self.paths(output), self._sizes(journal, output), strict=True):
                if not path.is_file() or path.stat().st_size < size:
                    return False
        return True

    def _opened(self, output: str) -> list[BinaryIO]:
        """The files of an output, of which only so many are open at a time."""
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
            # opened again after it was closed for want of descriptors, it keeps what is counted and not yet committed
            file = path.open("ab")
            file.truncate(size)
            opened.append(file)
        return opened
