"""The programs in pages of docs."""

import re
from pathlib import Path


def python_blocks(page: Path) -> list[str]:
    """Its blocks of Python, in their order."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
