"""Plain pytest where no extra is installed: it collects every test file, or skips the file and says why."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.without_extras import OPTIONAL

pytestmark = pytest.mark.slow  # a process that imports every test file


def test_what_cannot_be_imported_is_skipped():
    plugin = ["-p", "tests.support.without_extras", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *plugin, "-rs", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    skipped = re.findall(r"^SKIPPED .*: (\S+) is not installed$", done.stdout, re.MULTILINE)
    assert {"transformers", "lm-eval", "megatron-core", "hypothesis", "triton", "tiktoken", "pyarrow"} <= set(skipped)
    assert {name.replace("-", "_").removesuffix("_core") for name in skipped} <= OPTIONAL
