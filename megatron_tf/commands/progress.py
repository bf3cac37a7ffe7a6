"""Progress display of commands that copy a lot of data."""

import sys
from typing import Any

from tqdm import tqdm


def byte_bar(what: str, total: int) -> Any:
    """Create a progress bar of `total` bytes; if standard error is not a terminal, a line every ten seconds."""
    on_terminal = sys.stderr.isatty()
    lines = None if on_terminal else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"
    pause = 0.1 if on_terminal else 10
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, delay=pause, mininterval=pause, bar_format=lines)
