"""Building the extension without a compiler ends with one sentence that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_missing_compiler_is_named(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "needs a C++20 compiler" in done.stderr
    assert "Traceback" not in done.stderr
