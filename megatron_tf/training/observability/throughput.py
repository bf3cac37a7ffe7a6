"""How well the machine is used: operations against its rate, memory at its peak."""

import resource
import sys

import torch
import torch.distributed as dist

from megatron_tf.config import RunConfig
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.mesh import Mesh

# Dense 16-bit matrix products, in 1e12 operations a second, by the makers' data sheets
_PEAK_TERAFLOPS = {"B200": 2250.0, "H200": 989.4, "H100": 989.4, "A100": 312.0, "L40": 181.0}


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Operations a second of one device: `logging.peak_teraflops`, else by the name of a known GPU in 16 bits."""
    if config.logging.peak_teraflops is not None:
        return config.logging.peak_teraflops * 1e12
    if device.type != "cuda" or config.training.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((teraflops * 1e12 for model, teraflops in _PEAK_TERAFLOPS.items() if model in name), None)


def peak_memory(mesh: Mesh) -> int:
    """Most bytes that any rank has held so far: on its GPU, or in its process on a CPU; every rank calls it."""
    if mesh.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        used = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(all_reduce(torch.tensor(used, device=mesh.device), mesh.world, dist.ReduceOp.MAX))
