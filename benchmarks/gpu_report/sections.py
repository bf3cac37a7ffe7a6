"""The sections in their order, and the processes that run them."""

import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_report import correctness, endtoend, figures, fused, saving, waits
from benchmarks.gpu_report.result import Result, read_result
from benchmarks.gpu_report.scale import Scale

SECTIONS: dict[str, tuple[Callable[[Scale, Result], None], int]] = {
    "ceilings": (figures.ceilings, 60),
    "golden": (correctness.golden, 60),
    "models": (correctness.models, 60),
    "losses": (correctness.losses, 120),
    "kernels": (correctness.kernels, 180),
    "loss": (fused.loss, 90),
    "dropout": (fused.dropout, 60),
    "fp8": (fused.fp8, 90),
    "program": (endtoend.program, 300),
    "between": (figures.between, 120),
    "pattention": (figures.pattention, 240),
    "graph": (figures.graph, 60),
    "waits": (waits.waits, 60),
    "training_small": (figures.training_small, 180),
    "training_large": (figures.training_large, 300),
    "determinism": (endtoend.determinism, 180),
    "decoding": (figures.decoding, 90),
    "saving": (saving.saving, 120),
}
"""Name -> (function, timeout in seconds); correctness comes first."""


def run_sections(names: Sequence[str], scale: Scale, folder: Path) -> None:
    """Run sections in this process, one after the other; each writes its results into `folder`.

    An alarm ends the process if a section takes too long, even if it hangs in a driver.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in names:
        function, limit = SECTIONS[name]
        result = Result(path=folder / f"{name}.json")
        print(f"{name}:", flush=True)
        result.write()
        signal.alarm(limit)
        start = time.perf_counter()
        with result.guarded(name):
            function(scale, result)
            result.is_complete = True
        result.seconds = time.perf_counter() - start
        result.write()
        _release()
    signal.alarm(0)


def _release() -> None:
    """Free the memory and compiled code of a section."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_in_process(names: Sequence[str], arguments: Sequence[str], folder: Path) -> None:
    """Run sections in a child process; after a crash, the remaining ones run in a new one."""
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
    left = list(names)
    while left:
        command = [sys.executable, str(Path(__file__).parents[1] / "gpu.py"), *arguments, "--run-sections", *left]
        code = subprocess.run(command, check=False).returncode
        done = [name for name in left if (folder / f"{name}.json").exists()]
        if code:
            _blame(done[-1] if done else left[0], code, folder)
        left = [name for name in left if name not in done][0 if done else 1 :]


def _blame(name: str, code: int, folder: Path) -> None:
    """Record that a section ended the process; its earlier results are kept."""
    path = folder / f"{name}.json"
    result = read_result(path) if path.exists() else Result(path=path)
    is_late = code == -signal.SIGALRM
    result.is_complete = False
    result.is_true(name, False, f"stopped after {SECTIONS[name][1]} s" if is_late else f"its process ended with {code}")
