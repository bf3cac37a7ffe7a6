"""Download packages for a GPU machine without a network into a folder of wheels."""

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
COLLECTED = (
    "annotated-types",
    "backports-zstd",
    "gigatoken",
    "orjson",
    "pybind11",
    "pydantic",
    "pydantic-core",
    "pyyaml",
    "safetensors",
    "sentencepiece",
    "setuptools",
    "tokenizers",
    "tqdm",
    "typing-extensions",
    "typing-inspection",
    "xxhash",
)
"""Packages that megatron_tf and the report need, except torch, triton and numpy, which the image contains."""
LIMIT_MIB = 64


def collect(folder: Path, python: str) -> int:
    """Download wheels of requirements/tested.txt for CPython `python`, such as 3.12, on x86-64 Linux.

    Raises SystemExit with pip's last line if one is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = dict(_versions((REPOSITORY / "requirements/tested.txt").read_text()))
    wanted = [f"{name}=={versions[name]}" for name in COLLECTED if name in versions]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    # pip matches platform tags literally; the list starts at the newest glibc that a GPU image is likely to have
    for glibc in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5):
        command += ["--platform", f"manylinux_2_{glibc}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    job = subprocess.run([*command, *wanted], stderr=subprocess.PIPE, text=True, check=False)
    if job.returncode:
        raise SystemExit(f"error: {(job.stderr.strip().splitlines() or ['pip failed'])[-1].removeprefix('ERROR: ')}")
    size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20
    print(f"{folder}: {len(wanted)} wheels for CPython {python}, {size:.0f} MiB; the limit is {LIMIT_MIB} MiB")
    print(f"on the GPU machine: python benchmarks/gpu.py --packages {folder.name}")
    return int(size > LIMIT_MIB)


def _versions(requirements: str) -> list[tuple[str, str]]:
    return re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", requirements, re.MULTILINE)
