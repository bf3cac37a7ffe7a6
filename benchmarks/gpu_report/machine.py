"""Describe the machine and the software versions of a report."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_tf

PACKAGES = ("torch", "triton", "numpy", "flash_attn", "transformer_engine", "apex")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the GPU, its driver and the versions of the packages that compute."""
    facts = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors, {memory}"
        facts["GPUs"] = str(torch.cuda.device_count())
        facts["driver, CUDA"] = f"{_driver()}, {torch.version.cuda}"
    facts["CPUs"] = str(os.cpu_count())
    facts["Python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["megatron_tf"] = f"{megatron_tf.__version__}, {_commit()}"
    return facts


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown driver"


def _commit() -> str:
    return _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD") or "unknown commit"


def _output(*command: str) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0] if found else ""
