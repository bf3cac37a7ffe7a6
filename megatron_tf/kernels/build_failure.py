"""Kernels that this machine can't build: which errors say so, and the line that names the cause and the remedy."""

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
_NO_C_COMPILER = "Failed to find C compiler"  # a plain RuntimeError of Triton's


def make_compiler_cache() -> None:
    """Make the directory TORCHINDUCTOR_CACHE_DIR, which torch needs whatever the kernels. Raises UserError where it
    can't be made."""
    directory = os.environ.get(_CACHES["compiled"])
    if not directory:
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR can't be made: {error}: set it to a writable directory, or unset it"
        ) from error


def is_build_failure(error: Exception) -> bool:
    """Whether a compiler or its cache raised this, rather than what the kernels compute."""
    # without a cache directory the imports of torch's compilers fail, which is one of these errors
    if isinstance(error, (OSError, subprocess.CalledProcessError)):
        return True
    return isinstance(error, _compiler_errors()) or str(error).startswith(_NO_C_COMPILER)


def _compiler_errors() -> tuple[type[Exception], ...]:
    # private modules: torch names the errors of its compilers nowhere else
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

    types = BackendCompilerFailed, GPUTooOldForTriton, TritonMissing
    if find_spec("triton") is None:
        return types
    from triton.errors import TritonError

    return *types, TritonError


def describe_build_failure(name: str, error: Exception) -> str:
    """One line about the kernels `name`, "compiled" or "triton": the host, the cause and the remedy."""
    cause = getattr(error, "inner_exception", error)  # inductor wraps what its compilers raise
    line = _first_cause(cause)
    return f"{name} kernels can't be built on host {socket.gethostname()}: {line}: {_remedy(name, cause, line)}"


def _first_cause(cause: Exception) -> str:
    """The line of a compiler's output that says what is wrong, or else the first line of the message."""
    output = getattr(cause, "output", None) or str(cause) or type(cause).__name__
    lines = [line.strip() for line in str(output).splitlines() if line.strip()]
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
    """Whether inductor, which does not quote paths for the linker, can't use them."""
    return any(map(str.isspace, "".join(paths)))


def _inductor_cache() -> str:
    # private: without TORCHINDUCTOR_CACHE_DIR only inductor knows where its cache is
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
