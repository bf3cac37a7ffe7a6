"""Make the source tree importable: put collected packages on the path and build the extensions in place."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXTENSIONS = ("megatron_tf.data._index", "megatron_tf.kernels._native")
REQUIRED = ("pydantic", "xxhash", "yaml", "tqdm", "safetensors", "numpy")


def install_packages(wheels: Path, target: Path) -> None:
    """Unpack wheels into `target` and put it first on the path of this process and its child processes.

    Raises SystemExit with pip's last line if a wheel does not fit this Python.
    """
    if not (files := sorted(wheels.glob("*.whl"))):
        raise SystemExit(f"error: {wheels} contains no wheels: run python benchmarks/gpu.py --collect {wheels}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--upgrade", "--target", str(target), *map(str, files)]
    job = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if job.returncode:
        raise SystemExit(f"error: {(job.stderr.strip().splitlines() or ['pip failed'])[-1].removeprefix('ERROR: ')}")
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    importlib.invalidate_caches()


def require_packages() -> None:
    """Raise SystemExit with the names of missing packages, if there are any."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"error: not installed: {', '.join(missing)}. With a network, "
            "python benchmarks/gpu.py --collect DIR downloads them; here, --packages DIR uses them"
        )


def build_extensions() -> None:
    """Build the C++ extensions in place unless they are importable. Raises SystemExit with the compiler's last line."""
    if all(_is_built(name) for name in EXTENSIONS):
        return
    print("building the C++ extensions", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "4"]
    job = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    importlib.invalidate_caches()
    if job.returncode or not all(_is_built(name) for name in EXTENSIONS):
        raise SystemExit(f"error: {(job.stdout.strip().splitlines() or ['setup.py failed'])[-1]}")


def _is_built(name: str) -> bool:
    package, _, module = name.rpartition(".")
    folder = REPOSITORY / package.replace(".", "/")
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return any((folder / f"{module}{suffix}").exists() for suffix in suffixes) or _is_installed(name)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
