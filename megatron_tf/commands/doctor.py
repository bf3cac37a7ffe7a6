"""Check this machine and print what a bug report needs: versions, devices, backends, optional packages, limits.

Each line says ok, note (something works differently or slower) or problem (something will fail), with a remedy.
The exit code is 1 if there is a problem.

Example:
    megatron-tf doctor
"""

import importlib
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from megatron_tf.commands.arguments import make_parser
from megatron_tf.commands.runner import command, import_late
from megatron_tf.extras import EXTRAS, how_to_install
from megatron_tf.parallel.launch import LaunchError, number_of

OK = "ok"
NOTE = "note"
PROBLEM = "problem"

PURPOSES = {
    "apex": "kernels.norm and kernels.optimizer: apex",
    "datasets": "megatron-tf preprocess-data --hf-dataset",
    "flash_attn": "attention on GPUs in 16 bits (kernels.attention)",
    "lm_eval": "megatron-tf lm-eval",
    "matplotlib": "megatron-tf plot-run",
    "mpi4py": "megatron-tf preprocess-data on several machines, training under mpiexec",
    "pyarrow": "preprocessing of .parquet and .arrow files",
    "tensorboard": "logging.tensorboard_dir",
    "transformer_engine": "kernels.attention, norm and optimizer: transformer_engine",
    "transformers": "megatron-tf convert-checkpoint --to hf",
    "triton": "kernels.pattention: triton, and compiled kernels on GPUs",
    "wandb": "logging.wandb_project",
}
"""Optional package -> what uses it."""
_REQUIRED = ("torch", "numpy", "sentencepiece", "tokenizers", "gigatoken", "pydantic")
_BUILT_AGAINST_TORCH = ("apex", "flash_attn", "transformer_engine", "triton")
"""Packages that may be installed but fail to import because they were built for another release of PyTorch."""
_DEFAULT_PORT = 29500  # torchrun's default
_OPEN_FILES = 1024
_SHARED_MEMORY = 512 << 20  # NCCL and MPI need some for each pair of ranks; containers have 64 MiB by default
_TIMEOUT = timedelta(seconds=20)


class Finding(NamedTuple):
    """One line of the report."""

    level: str
    subject: str
    text: str
    remedy: str = ""


@command()
def main(arguments: list[str] | None = None) -> int:
    """Print the report. Returns 1 if there is a problem."""
    make_parser("doctor", __doc__).parse_args(arguments)
    problems = 0
    for title, check in CHECKS:
        print(f"{title}:")
        for finding in check():
            problems += finding.level == PROBLEM
            print(f"  {finding.level:<8} {finding.subject:<20} {finding.text}")
            if finding.remedy:
                print(f"  {'':<8} {'':<20} -> {finding.remedy}")
    print(f"{problems} problem(s)" if problems else "no problem found")
    return 1 if problems else 0


def versions() -> Iterator[Finding]:
    """Yield the versions of this package, Python and the required packages."""
    from megatron_tf import __version__

    yield Finding(OK, "megatron_tf", __version__)
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _REQUIRED:
        version = version_of(package)
        if version is None:
            yield Finding(PROBLEM, package, "not installed", remedy=how_to_install(package))
        else:
            yield Finding(OK, package, version)


def optional_packages() -> Iterator[Finding]:
    """Yield which optional packages are installed, and what they are used for."""
    for package, purpose in PURPOSES.items():
        version = version_of(package)
        if version is None:
            remedy = how_to_install(package) if package in EXTRAS else "build it from its sources"
            yield Finding(NOTE, package, f"not installed; for {purpose}", remedy=remedy)
        elif package in _BUILT_AGAINST_TORCH and (reason := _import_error(package)):
            remedy = f"build {package} {version} again for this PyTorch, or uninstall it"
            yield Finding(PROBLEM, package, f"installed, but can't be imported: {reason}", remedy=remedy)
        else:
            yield Finding(OK, package, f"{version}, for {purpose}")


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    """Return the first line of what importing a module raises, empty if it works."""
    try:
        importlib.import_module(module)
    # RuntimeError: for example operators registered for another PyTorch
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0]
    return ""


def compiled_code() -> Iterator[Finding]:
    """Yield whether the C++ extensions load, and whether there is a compiler for compiled kernels."""
    for name in ("data._index", "kernels._native"):
        if reason := _import_error(f"megatron_tf.{name}"):
            yield Finding(
                PROBLEM, name, f"can't be loaded: {reason}", remedy="build it again: pip install . in the checkout"
            )
        else:
            yield Finding(OK, name, "loads")
    program, *_ = os.environ.get("CXX", "").split() or ["c++"]
    compiler = shutil.which(program)
    if compiler is None:
        remedy = "install g++ for kernels.pattention: compiled; without it, auto falls back to eager kernels"
        yield Finding(NOTE, "compiler", f"{program} is not on PATH", remedy=remedy)
    else:
        yield Finding(OK, "compiler", compiler)


def devices() -> Iterator[Finding]:
    """Yield the CPUs and GPUs that PyTorch can use."""
    try:
        import_late("torch")
    except (ImportError, OSError) as error:
        yield Finding(
            PROBLEM,
            "torch",
            f"can't be imported: {error}",
            remedy="install it again: pip install --force-reinstall torch",
        )
        return
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(OK, "cpu", f"{usable} usable of {os.cpu_count()}, {torch.get_num_threads()} threads for PyTorch")
    if torch.version.cuda is None:
        yield Finding(NOTE, "gpu", "this build of PyTorch has no CUDA: training runs on the CPU")
        return
    if not torch.cuda.is_available():
        remedy = "if there should be one: check nvidia-smi, CUDA_VISIBLE_DEVICES, and the driver's version"
        yield Finding(NOTE, "gpu", f"PyTorch is built with CUDA {torch.version.cuda}, and finds no GPU", remedy=remedy)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        yield Finding(OK, f"cuda:{number}", text)


def communication() -> Iterator[Finding]:
    """Yield whether ranks can communicate: one all-reduce of a single rank in each backend, a free port, a name."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError):
        return  # `devices` says so
    backends = ["gloo"]
    if torch.cuda.is_available() and dist.is_nccl_available():
        backends.append("nccl")
    for backend in backends:
        yield _all_reduce(backend)
    yield _host_name()
    yield _port()


def _all_reduce(backend: str) -> Finding:
    import torch
    import torch.distributed as dist

    device = "cuda" if backend == "nccl" else "cpu"
    remedy = "name a network interface that is up, such as lo: export GLOO_SOCKET_IFNAME=lo"
    if backend == "nccl":
        remedy = "run again with NCCL_DEBUG=INFO, whose lines name the cause"
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
    except RuntimeError as error:  # both backends raise these
        reason = str(error).strip().partition("\n")[0]
        return Finding(PROBLEM, backend, f"an all-reduce fails: {reason}", remedy=remedy)
    finally:
        if dist.is_initialized():  # otherwise the next backend could not start
            dist.destroy_process_group()
    return Finding(OK, backend, "an all-reduce of one rank works")


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        remedy = f"add {name} to /etc/hosts, or export GLOO_SOCKET_IFNAME and MASTER_ADDR"
        return Finding(PROBLEM, "host name", f"{name} has no address: {error}", remedy=remedy)
    return Finding(OK, "host name", f"{name} is {address}")


def _port() -> Finding:
    remedy = "export MASTER_PORT, or give torchrun --master-port, with a free one"
    try:
        port = number_of("MASTER_PORT", _DEFAULT_PORT)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except (LaunchError, OverflowError) as error:  # not a number, or out of range
        return Finding(PROBLEM, "port", str(error), remedy=remedy)
    except OSError as error:
        return Finding(NOTE, "port", f"{port} can't be bound: {error.strerror}", remedy=remedy)
    return Finding(OK, "port", f"{port} is free")


def limits() -> Iterator[Finding]:
    """Yield the limits of the operating system: open files, shared memory, temporary files."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _OPEN_FILES:
        yield Finding(PROBLEM, "open files", f"at most {files}", remedy=f"ulimit -n {min(4 * _OPEN_FILES, most)}")
    else:
        yield Finding(OK, "open files", f"at most {files:,}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        text = f"{free / 2**30:.1f} GiB free in {shared}"
        if free < _SHARED_MEMORY:
            remedy = "give the container more (docker run --shm-size=2g), or remove old files there"
            yield Finding(PROBLEM, "shared memory", text, remedy=remedy)
        else:
            yield Finding(OK, "shared memory", text)
    yield _temporary_files()


def _temporary_files() -> Finding:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    except OSError as error:
        return Finding(PROBLEM, "temporary files", f"can't be written: {error}", remedy="export TMPDIR=DIRECTORY")
    directory = tempfile.gettempdir()
    return Finding(OK, "temporary files", f"{shutil.disk_usage(directory).free / 2**30:.1f} GiB free in {directory}")


CHECKS: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
    ("versions", versions),
    ("compiled code", compiled_code),
    ("devices", devices),
    ("communication", communication),
    ("limits", limits),
    ("optional packages", optional_packages),
]
"""Titles of the sections of the report, and the functions that find their lines."""
