"""The results of a section: checks that pass or fail, and tables of measurements."""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Check:
    """A number compared with its limit, or a condition that must hold."""

    name: str
    passed: bool
    found: str
    """The value, as shown in the report."""
    limit: str = ""


@dataclass
class Table:
    """A table of measurements."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass
class Result:
    """The results of one section, written after each entry, so that a killed section keeps its results."""

    path: Path | None = None
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Numbers by name, for other sections, the goals and programs."""
    skipped: list[str] = field(default_factory=list)
    """Reasons why something was skipped."""
    seconds: float = 0.0
    is_complete: bool = False

    def at_most(self, name: str, found: float, limit: float) -> None:
        """Check that a number does not exceed its limit; NaN fails."""
        self._add(Check(name, bool(found <= limit), found=f"{found:.3g}", limit=f"<= {limit:.3g}"))

    def is_true(self, name: str, passed: bool, found: str = "") -> None:
        """Check that a condition holds."""
        self._add(Check(name, passed, found or ("yes" if passed else "no")))

    def skip(self, reason: str) -> None:
        """Record that something was skipped."""
        self.skipped.append(reason)
        self.write()

    def table(self, title: str, *columns: str) -> Callable[..., None]:
        """Start a table; the returned function appends a row and prints it."""
        table = Table(title, list(columns))
        self.tables.append(table)

        def append(*cells: object) -> None:
            table.rows.append([str(cell) for cell in cells])
            print(f"  {title}: " + ", ".join(f"{c} {v}" for c, v in zip(columns, cells, strict=True)), flush=True)
            self.write()

        return append

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Turn an exception into a failed check, so that one failure does not hide the others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            self._add(Check(name, False, f"{type(error).__name__}: {lines[0][:200]}"))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Write the section's file."""
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(self) | {"path": str(self.path)}, indent=1))
            partial.replace(self.path)

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.found} {check.limit}", flush=True)
        self.write()


def read_result(path: Path) -> Result:
    """Read the file of a section."""
    values = json.loads(path.read_text())
    values["path"] = path
    values["checks"] = [Check(**check) for check in values["checks"]]
    values["tables"] = [Table(**table) for table in values["tables"]]
    return Result(**values)
