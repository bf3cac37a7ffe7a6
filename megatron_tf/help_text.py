"""The layout of --help: key, type and default in columns, and the description below."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

_INDENT, _MEANING_INDENT, _GAP = "  ", " " * 6, 2
_MAX_COLUMNS = 100  # longer lines are hard to read


class Item(NamedTuple):
    """A key or an option; `type` lists its choices, if any, and `default` may be "required"."""

    name: str
    type: str
    default: str
    meaning: str


def layout(items: Sequence[Item]) -> list[str]:
    """Format the items as lines: columns as wide as the longest entry, descriptions wrapped to the terminal."""
    name_width = max((len(item.name) for item in items), default=0) + _GAP
    type_width = max((len(item.type) for item in items), default=0) + _GAP
    text_width = max(40, min(_MAX_COLUMNS, shutil.get_terminal_size().columns) - len(_MEANING_INDENT))
    lines = []
    for item in items:
        columns = f"{item.name:<{name_width}}{item.type:<{type_width}}{item.default}"
        lines.append(f"{_INDENT}{columns}".rstrip())
        lines += [_MEANING_INDENT + line for line in textwrap.wrap(item.meaning, text_width)]
    return lines
