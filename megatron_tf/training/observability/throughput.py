"""Peak FLOP/s of the device, for the model FLOP utilization (MFU), and peak memory."""

import re
import resource
import sys

import torch
import torch.distributed as dist

from megatron_tf.config import RunConfig
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.mesh import Mesh

# TFLOP/s of dense 16-bit matrix products with fp32 accumulation, from the vendors' data sheets (half of the rates "with
# sparsity"). The first match in the device's name is used
_PEAK_TERAFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "MI300X": 1307.4,
}


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device: `logging.peak_teraflops`, else that of a known GPU in 16 bits, else None."""
    if config.logging.peak_teraflops is not None:
        return config.logging.peak_teraflops * 1e12
    if device.type != "cuda" or config.training.precision in ("fp32", "fp64"):
        return None
    return flops_by_name(torch.cuda.get_device_name(device))


def flops_by_name(name: str) -> float | None:
    """Return the peak 16-bit FLOP/s of a GPU by its name in torch.cuda.get_device_name; None if it is unknown."""
    if re.search(r"\b(MIG|Laptop|D)\b", name):  # a part of a GPU, or a slower one
        return None
    # whole words only: an A1000 is not an A100, and a GB200 not a B200
    known = (model for model in _PEAK_TERAFLOPS if re.search(rf"\b{model}\b", name))
    return next((_PEAK_TERAFLOPS[model] * 1e12 for model in known), None)


def why_no_mfu(config: RunConfig, device: torch.device) -> str:
    """Return one line that says why a run on a GPU reports no MFU and what to set; empty if it does, and on a CPU."""
    if device.type != "cuda" or peak_flops(config, device) is not None:
        return ""
    name, precision = torch.cuda.get_device_name(device), config.training.precision
    return f"no MFU: the peak FLOP/s of {name} in {precision} is unknown: set logging.peak_teraflops"


def peak_memory(mesh: Mesh) -> int:
    """Return the peak memory in bytes of any rank, on its GPU or in its process on a CPU. Collective."""
    if mesh.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
        used = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(all_reduce(torch.tensor(used, device=mesh.device), mesh.world, dist.ReduceOp.MAX))
