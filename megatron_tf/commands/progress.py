"""Progress display of commands that take long."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def byte_bar(what: str, total: int) -> Any:
    """Create a progress bar of `total` bytes; if standard error is not a terminal, a line every ten seconds."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, **_display())


def tracked(what: str, items: Sequence[T]) -> Iterable[T]:
    """Yield the items, with progress shown as by `byte_bar`."""
    bar: Iterable[T] = tqdm(items, desc=what, **_display())
    return bar


def _display() -> dict[str, Any]:
    on_terminal = sys.stderr.isatty()
    lines = None if on_terminal else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"
    pause = 0.1 if on_terminal else 10
    return {"delay": pause, "mininterval": pause, "bar_format": lines}
