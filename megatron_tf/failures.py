"""Turns failures of the machine into one line: out of memory, failed communication, broken packages.

torch raises these as long errors from deep inside. None of them is a bug of ours, and each has a remedy. torch is not
imported here: if nothing else imported it, none of its errors was raised.
"""

import re
import socket
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.errors import UserError
from megatron_tf.host import available_memory

LESS_MEMORY = "compute less at a time, in a smaller type, or on more ranks"
"""The default remedy for an OutOfMemoryError."""
_NCCL_REMEDY = (
    "restart with NCCL_DEBUG=INFO, which prints the cause; if hosts have several networks, set "
    "NCCL_SOCKET_IFNAME to the interface that all of them share"
)
_GLOO_REMEDY = (
    "check the errors of the other ranks; if hosts have several networks, set GLOO_SOCKET_IFNAME to the interface that "
    "all of them share"
)
_CPU_MEMORY = "DefaultCPUAllocator"
# errors of allocations outside torch's allocator: by the CUDA runtime, cuBLAS and NCCL
_OTHER_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cuda failure 2 'out of memory'")
_BROKEN_LIBRARY = ("undefined symbol", "cannot open shared object file", "invalid ELF header", "GLIBC")
_GPU = r"\b(GPU \d+)"
_AMOUNT = r"([\d.]+ \w+)"  # 2.00 GiB
_LONGEST = 200  # characters of torch's own text that a message quotes


class OutOfMemoryError(UserError):
    """A device ran out of memory."""


class CommunicationError(UserError):
    """A collective failed or timed out."""


class BrokenPackageError(UserError):
    """The compiled code of an installed package does not load."""


def explain(error: BaseException, *, less_memory: str = LESS_MEMORY) -> UserError | None:
    """Return a one-line error that says what to do, or None if `error` is not a failure of the machine.

    `less_memory` is the remedy if memory runs out. Errors that torch wrapped in others are found.
    """
    for cause in _causes(error):
        found = _out_of_memory(cause, less_memory) or _communication(cause) or _broken_package(cause)
        if found is not None:
            return found
    return None


@contextmanager
def one_line_out_of_memory(remedy: str) -> Iterator[None]:
    """Raise OutOfMemoryError with `remedy` if memory runs out within the context; other errors propagate."""
    try:
        yield
    except Exception as error:
        found = explain(error, less_memory=remedy)
        if isinstance(found, OutOfMemoryError):
            raise found from error
        raise


def communication_failure(error: BaseException) -> str | None:
    """Return the cause of a failed collective in a few words, or None if `error` has another origin."""
    cause = next(filter(_is_of_communication, _causes(error)), None)
    return None if cause is None else _summary(cause)


def remedy_for(failure: str) -> str:
    """Return what to do about a failed collective, depending on the library that `failure` names."""
    return _NCCL_REMEDY if "nccl" in failure.lower() else _GLOO_REMEDY


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, up to a UserError, which is explained already.

    torch's pipeline stages wrap whatever a forward raises.
    """
    seen: list[BaseException] = []  # an error can be its own cause, in a circle
    cause: BaseException | None = error
    while cause is not None and cause not in seen and not isinstance(cause, UserError):
        yield cause
        seen.append(cause)
        cause = cause.__cause__


def _out_of_memory(error: BaseException, remedy: str) -> OutOfMemoryError | None:
    text = str(error)
    is_of_device = _is_torch_error(error, "OutOfMemoryError")
    is_of_host = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _CPU_MEMORY in text)
    is_of_library = isinstance(error, RuntimeError) and any(sign in text for sign in _OTHER_MEMORY)
    if not (is_of_device or is_of_host or is_of_library):
        return None
    host = socket.gethostname()
    device = f"host {host}" if is_of_host else f"{_first_match(_GPU, text) or 'the GPU'} of host {host}"
    amounts = _amounts_of_host(text) if is_of_host else _amounts_of_device(text)
    said = f" ({', '.join(amounts)})" if amounts else ""
    return OutOfMemoryError(f"out of memory on {device}{said}: {remedy}")


def _amounts_of_device(text: str) -> list[str]:
    """Return the requested and the free memory, as far as the error contains them."""
    requested = _first_match(rf"ried to allocate {_AMOUNT}", text)
    free, total = (_first_match(f"{before} {_AMOUNT}", text) for before in ("of which", "total capacity of"))
    amounts = [f"{requested} requested"] if requested else []
    return [*amounts, f"{free} of {total} free"] if free and total else amounts


def _amounts_of_host(text: str) -> list[str]:
    """Return the same on a CPU, where the error of torch or numpy contains the request but not what is free."""
    num_bytes = _first_match(r"tried to allocate (\d+) bytes", text)
    amount = f"{int(num_bytes) / 2**30:,.2f} GiB" if num_bytes else _first_match(rf"Unable to allocate {_AMOUNT}", text)
    amounts = [f"{amount} requested"] if amount else []
    return [*amounts, f"{available_memory() / 2**30:,.2f} GiB free"]


def _communication(error: BaseException) -> CommunicationError | None:
    if not _is_of_communication(error):
        return None
    failure = _summary(error)
    return CommunicationError(
        f"host {socket.gethostname()}: communication with other ranks failed ({failure}): {remedy_for(failure)}"
    )


def _is_of_communication(error: BaseException) -> bool:
    return _is_torch_error(error, "DistError") or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _summary(error: BaseException) -> str:
    """Return the text of an error in one line; NCCL's cause, which comes last in its text, comes first."""
    text = str(error)
    _, found, cause = text.partition("Last error:")
    if found and cause.strip():
        text = f"NCCL: {cause}"
    return textwrap.shorten(text, _LONGEST) or type(error).__name__


def _broken_package(error: BaseException) -> BrokenPackageError | None:
    """Recognize a library that the loader rejects: an ImportError with a file, or ctypes' OSError without an errno."""
    text = str(error)
    is_module = isinstance(error, ImportError) and (error.path or "").endswith(".so")
    is_library = isinstance(error, OSError) and error.errno is None
    is_refused = isinstance(error, ImportError) or is_library
    if not is_module and not (is_refused and any(sign in text for sign in _BROKEN_LIBRARY)):
        return None
    # the path of the file shows the package: an ImportError has only the last part of the module's name
    reason = textwrap.shorten(text, _LONGEST)
    return BrokenPackageError(
        f"compiled code does not load ({reason}): reinstall its package for this Python and PyTorch, or remove it"
    )


def _is_torch_error(error: BaseException, name: str) -> bool:
    torch = sys.modules.get("torch")
    distributed = sys.modules.get("torch.distributed")
    kinds = [kind for module in (torch, distributed) if (kind := getattr(module, name, None)) is not None]
    return isinstance(error, tuple(kinds))


def _first_match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return None if found is None else found[1]
