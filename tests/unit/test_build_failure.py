"""The line about kernels that can't be built, by what compilers raise; test_kernel_builds.py runs real compilers."""

import errno
import os
import subprocess

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler, TritonMissing

from megatron_tf.errors import UserError
from megatron_tf.kernels.build_failure import describe_build_failure, is_build_failure, make_compiler_cache

LINKER = "/usr/bin/ld: cannot find -ltorch: No such file or directory\ncollect2: error: ld returned 1 exit status\n"
COMPILER = (
    "In file included from a.h:1:\nb.cpp:3:5: fatal error: omp.h: No such file or directory\ncompilation terminated.\n"
)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(error):
    return InductorError(error, None)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "compiled",
            wrapped(InvalidCxxCompiler()),
            "No working C++ compiler found in torch._inductor.config.cpp.cxx: ",
        ),
        ("compiled", wrapped(CppCompileError(["g++"], LINKER)), "cannot find -ltorch: No such file or directory: "),
        ("compiled", wrapped(CppCompileError(["g++"], COMPILER)), "b.cpp:3:5: fatal error: omp.h: No such file"),
        ("compiled", wrapped(FULL), "No space left on device: set TORCHINDUCTOR_CACHE_DIR to a writable directory"),
        ("compiled", PermissionError("denied"), "denied: set TORCHINDUCTOR_CACHE_DIR to a writable directory"),
        ("compiled", TritonMissing(None), "working triton installation. "),
        ("compiled", TritonMissing(None), ": install triton on a GPU that it supports"),
        ("triton", FULL, "No space left on device: set TRITON_CACHE_DIR to a writable directory with free space"),
        ("triton", RuntimeError("Failed to find C compiler. Please specify"), ": install gcc or set CC"),
        ("triton", subprocess.CalledProcessError(1, ["gcc"]), "non-zero exit status 1.: install gcc or set CC"),
    ],
)
def test_one_line_names_host_cause_and_remedy(name, error, said):
    assert is_build_failure(error)
    line = describe_build_failure(name, error)
    assert line.startswith(f"{name} kernels can't be built on host ")
    assert said in line
    assert "\n" not in line


def test_a_path_with_a_space_is_the_remedy_where_there_is_one(monkeypatch, tmp_path):
    error = wrapped(CppCompileError(["g++"], LINKER))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a b"))
    monkeypatch.setattr(torch, "__path__", ["/nowhere/torch"])
    assert describe_build_failure("compiled", error).endswith("set TORCHINDUCTOR_CACHE_DIR to a path without spaces")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "ab"))
    assert describe_build_failure("compiled", error).endswith("install g++ or set CXX")
    monkeypatch.setattr(torch, "__path__", ["/no where/torch"])
    assert describe_build_failure("compiled", error).endswith("move the Python environment to a path without spaces")
    no_compiler = describe_build_failure("compiled", wrapped(InvalidCxxCompiler()))
    assert no_compiler.endswith("install g++ or set CXX")


@pytest.mark.parametrize(
    "error", [ValueError("ours"), torch.OutOfMemoryError("full"), RuntimeError("CUDA error")], ids=str
)
def test_what_kernels_compute_is_no_build(error):
    assert not is_build_failure(error)


def test_a_cache_directory_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "cache"))
    make_compiler_cache()
    assert (tmp_path / "new" / "cache").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    message = r"TORCHINDUCTOR_CACHE_DIR can't be created: .*file/cache': set it to a writable"
    with pytest.raises(UserError, match=message):
        make_compiler_cache()


@pytest.mark.parametrize(
    ("output", "said"),
    [("\n", "returned non-zero exit status 1"), (b"b.cpp:3: fatal error: omp.h\n", ": b.cpp:3: fatal error: omp.h:")],
    ids=["blank", "bytes"],
)
def test_any_output_of_a_compiler_is_explained(output, said):
    error = subprocess.CalledProcessError(1, ["g++"], output=output)
    assert said in describe_build_failure("compiled", wrapped(error))
