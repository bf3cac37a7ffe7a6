"""The script that measures code counts what a reader would."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/code_metrics.py"
FIRST = '''"""A module."""
from typing import TYPE_CHECKING

from package.second import g  # a cycle of two

if TYPE_CHECKING:
    from package.third import h


def f(a, b, c, d, *, e=None):
    """Docstring with a # that is no comment."""
    return [x if x else g(1, 2, 3, 4, 5, 6) for x in a]
'''
SECOND = """def g(*values):
    from package.third import h
    return h(*values)


from . import first
"""
THIRD = """import package.first


class C:
    def method(self, a, b, c):
        return None
"""


def test_a_package_of_three_modules_is_counted_right(tmp_path: Path) -> None:
    """Imports of type checkers and of functions make no cycle; `self` is no parameter."""
    package = tmp_path / "package"
    package.mkdir()
    for name, text in {"first": FIRST, "second": SECOND, "third": THIRD}.items():
        (package / f"{name}.py").write_text(text)
    command = [sys.executable, str(SCRIPT), str(package)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    table = dict(line.strip("| ").split(" | ") for line in printed.splitlines()[2:])
    assert table == {
        "files / lines": "3 / 24",
        "file lines, median / p90 / max": "6 / 11 / 12",
        "function lines, median / p90 / max": "3 / 3 / 3",
        "import cycles": "1",
        "functions with keyword-only arguments": "1 of 3",
        "functions with 4 or more positional parameters": "1",
        "calls with 6 or more positional arguments, per 1,000": "500.0",
        "comments per 100 lines": "4.2",
        "comprehensions / ternaries per 100 lines": "4.2 / 4.2",
    }
