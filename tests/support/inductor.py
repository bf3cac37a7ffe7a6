"""Whether inductor can build kernels here."""

import functools
import subprocess
import sys

PROBE = "import torch; print(torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8)))"


@functools.cache
def why_inductor_fails() -> str | None:
    """The last line of what torch.compile raises for a small function; None where it compiles."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stderr.splitlines() if "Error" in line or "cannot find" in line]
    return None if done.returncode == 0 else "torch.compile: " + (lines or ["failed"])[0]
