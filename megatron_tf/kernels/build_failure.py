"""Compiler failures: how to recognize them, and a one-line message that names the cause and the remedy."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_tf.errors import UserError

_COMPILERS = {"compiled": "install g++ or set CXX", "triton": "install gcc or set CC"}
_CACHES = {"compiled": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
_NO_C_COMPILER = "Failed to find C compiler"  # Triton raises it as a plain RuntimeError


def make_compiler_cache() -> None:
    """Create the directory TORCHINDUCTOR_CACHE_DIR, which torch needs for any choice of kernels.

    Raises UserError if it can't be created.
    """
    directory = os.environ.get(_CACHES["compiled"])
    if not directory:
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR can't be created: {error}: set it to a writable directory, or unset it"
        ) from error


def is_build_failure(error: Exception) -> bool:
    """Return whether a compiler or its cache raised `error`, rather than the computation itself."""
    # without a cache directory, importing torch's compilers raises one of these
    if isinstance(error, (OSError, subprocess.CalledProcessError)):
        return True
    return isinstance(error, _compiler_errors()) or str(error).startswith(_NO_C_COMPILER)


def _compiler_errors() -> tuple[type[Exception], ...]:
    # private modules: torch exports its compilers' errors nowhere else
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    types = BackendCompilerFailed, GPUTooOldForTriton, TritonMissing
    if find_spec("triton") is None:
        return types
    from triton.errors import TritonError

    return *types, TritonError


def describe_build_failure(name: str, error: Exception) -> str:
    """Describe in one line why the kernels `name` ("compiled" or "triton") failed: the host, the cause, the remedy."""
    cause = getattr(error, "inner_exception", error)  # inductor wraps what its compilers raise
    line = _first_cause(cause)
    return f"{name} kernels can't be built on host {socket.gethostname()}: {line}: {_remedy(name, cause, line)}"


def _first_cause(cause: Exception) -> str:
    """Return the line of a compiler's output that reports the error, or else the first line of the message."""
    output = getattr(cause, "output", None) or ""
    text = output.decode(errors="replace") if isinstance(output, bytes) else str(output)
    lines = [line.strip() for line in (text.strip() or str(cause)).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    # collect2 only repeats that the linker failed
    return next((line for line in lines if "error" in line and not line.startswith("collect2")), lines[0])


def _remedy(name: str, cause: Exception, line: str) -> str:
    if isinstance(cause, OSError) or "No space left on device" in line:
        return f"set {_CACHES[name]} to a writable directory with free space"
    if name == "compiled" and "triton" in line:
        return "install triton on a GPU that it supports"
    if name == "triton" or "No working C++ compiler" in line:
        return _COMPILERS[name]
    if _has_space(torch.__path__[0], sys.base_prefix):
        return "move the Python environment to a path without spaces"
    if _has_space(_inductor_cache()):
        return "set TORCHINDUCTOR_CACHE_DIR to a path without spaces"
    return _COMPILERS[name]


def _has_space(*paths: str) -> bool:
    """Return whether a path contains a space: inductor does not quote paths for the linker."""
    return any(map(str.isspace, "".join(paths)))


def _inductor_cache() -> str:
    # private: if TORCHINDUCTOR_CACHE_DIR is unset, only inductor knows the directory
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
