"""Failures of the machine are one line: memory, communication, packages that do not load; a bug is none of them."""

import ctypes
import importlib
import importlib.machinery
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tf.commands.runner import command
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.failures import communication_failure, explain, one_line_out_of_memory

HOST = socket.gethostname()
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of 79.11 GiB of which 1.03 GiB is "
    "free. Including non-PyTorch memory, this process has 78.08 GiB memory in use. Of the allocated memory 75.26 GiB "
    "is allocated by PyTorch, and 1.62 GiB is reserved by PyTorch but unallocated."
)
NCCL = (
    "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:93, unhandled cuda error (run with NCCL_DEBUG=INFO for "
    "details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Cuda failure 999 'unknown error'"
)


def code_of(action, **options):
    """The exit code of a command that does nothing but `action`."""

    @command(**options)
    def main(arguments=None):
        action()
        return 0

    return main([])


def raising(error, cause=None):
    def action():
        raise error from cause

    return action


def test_an_allocation_that_the_host_can_not_make_is_one_line(capsys):
    assert code_of(lambda: torch.empty(1 << 50), less_memory="buy some") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: out of memory on host {HOST} (4,194,304.00 GiB requested, ")
    assert error.endswith(" GiB free): buy some\n")
    assert error.count("\n") == 1
    assert code_of(lambda: np.empty(1 << 53), less_memory="buy some") == 1
    assert capsys.readouterr().err.startswith(f"error: out of memory on host {HOST} (64.0 PiB requested, ")


def test_a_gpu_that_is_full_is_named_with_what_was_requested_and_what_is_free(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "11")
    assert code_of(raising(torch.OutOfMemoryError(CUDA)), less_memory="do less") == 1
    said = f"[rank 11] error: out of memory on GPU 3 of host {HOST} (2.50 GiB requested, 1.03 GiB of 79.11 GiB free)"
    assert capsys.readouterr().err == f"{said}: do less\n"


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_memory_that_a_library_wants_is_told_without_amounts(text):
    assert str(explain(RuntimeError(text), less_memory="x")) == f"out of memory on the GPU of host {HOST}: x"


def test_what_a_pipeline_stage_wraps_is_found():
    wrapped = RuntimeError("[Stage 1] failed to run forward: args: (Tensor(...),)")
    wrapped.__cause__ = torch.OutOfMemoryError(CUDA)
    assert "out of memory on GPU 3" in str(explain(wrapped))
    with pytest.raises(UserError, match=r"^out of memory on GPU 3 .*: do less$"), one_line_out_of_memory("do less"):
        raise wrapped


def test_other_errors_pass_where_memory_is_explained():
    for error in (KeyError("tau"), dist.DistBackendError(NCCL), UserError("said")):
        with pytest.raises(type(error)) as caught, one_line_out_of_memory("do less"):
            raise error
        assert caught.value is error


def test_a_failure_of_nccl_is_its_last_error_and_what_to_set(capsys):
    assert code_of(raising(dist.DistBackendError(NCCL))) == 1
    error = capsys.readouterr().err
    assert "communication with other ranks failed (NCCL: Cuda failure 999 'unknown error'): " in error
    assert "NCCL_DEBUG=INFO" in error
    assert "NCCL_SOCKET_IFNAME" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        dist.DistNetworkError("The client socket has timed out after 600000ms\nwhile trying to connect"),
    ],
)
def test_a_failure_of_another_network_names_the_interface(failure, capsys):
    assert code_of(raising(failure)) == 1
    error = capsys.readouterr().err
    assert f"error: host {HOST}: communication with other ranks failed (" in error
    assert "GLOO_SOCKET_IFNAME" in error
    assert error.count("\n") == 1


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The name of a package whose compiled module the loader refuses."""
    package = tmp_path / "broken_extension"
    package.mkdir()
    (package / "__init__.py").write_text("from broken_extension import kernels\n")
    (package / f"kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    return "broken_extension"


def test_a_package_that_does_not_load_is_one_line(broken, capsys):
    assert code_of(lambda: importlib.import_module(broken)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: compiled code does not load (")
    assert "/broken_extension/kernels." in error
    assert error.endswith("): reinstall its package for this Python and PyTorch, or remove it\n")
    with pytest.raises(UserError, match=r"^a plot: compiled code does not load"):  # noqa: SIM117
        with needed_by("a plot"):
            importlib.import_module(broken)


def test_a_library_that_a_package_misses_is_one_line(capsys):
    assert code_of(lambda: ctypes.CDLL("libthere_is_none.so.1")) == 1
    assert "libthere_is_none.so.1: cannot open shared object file" in capsys.readouterr().err
    undefined = ImportError("a.so: undefined symbol: _ZN3c10", name="flash_attn_2_cuda")
    assert str(explain(undefined)).startswith("compiled code does not load (a.so: undefined symbol: _ZN3c10)")


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ImportError("cannot import name 'grow' from 'megatron_tf'", name="megatron_tf", path="megatron_tf/__init__.py"),
        ModuleNotFoundError("No module named 'megatron_tf.no'", name="megatron_tf.no"),
        OSError("an error that a library made up"),
        ValueError("out of memory"),
    ],
)
def test_a_bug_is_no_failure_of_the_machine(bug):
    assert explain(bug) is None
    with pytest.raises(type(bug)):
        code_of(raising(bug))


def test_what_was_explained_is_not_explained_again():
    said = UserError("write it otherwise")
    said.__cause__ = dist.DistBackendError(NCCL)
    assert explain(said) is None


def test_an_error_that_is_its_own_cause_is_explained_in_finite_time(capsys):
    bug = KeyError("a key")
    with pytest.raises(KeyError):
        code_of(raising(bug, bug))
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert communication_failure(first) is None
