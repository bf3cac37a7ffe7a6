"""A Pattention against the MLP of the same shape, forward and backward, with the same backend in the same run.

Eager against eager and compiled against compiled, in fp32 and bf16: ratios of the fastest of several runs. The matrix
products alone are the lower bound. C++ kernels on a CPU are compared with the eager MLP, and Triton's on a GPU with the
compiled one: python benchmarks/pattention.py
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.native import NativeKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.layers.pattention import Pattention
from megatron_tf.tokenformer.normalization import NORMALIZATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"cpu": [(4096, 768, 3072)], "cuda": [(16384, 768, 3072), (16384, 1536, 6144), (8192, 4096, 16384)]}
"""Device -> [(rows, width, tokens)]: the 150M, the 1.5B and a 7B-like model's feed-forward."""


def mlp(width: int, hidden: int) -> nn.Module:
    """Build Linear, GELU, Linear, without biases."""
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))


def pattention(width: int, tokens: int, norm: str) -> Pattention:
    """Build a Pattention with parameters of typical magnitude."""
    layer = Pattention(width, width, num_tokens=tokens, norm_activation=norm)
    nn.init.normal_(layer.key_tokens, std=0.02)
    nn.init.normal_(layer.value_tokens, std=0.02)
    return layer


def seconds(work: Callable[[], None]) -> float:
    """Measure one call in seconds, including synchronization with the device."""
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Run forward and backward."""

    def work() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(dy)

    return work


def products(width: int, tokens: int, x: Tensor) -> Callable[[], None]:
    """Run the six matrix products of a Pattention without anything in between."""
    keys, values = (torch.randn(tokens, width, device=DEVICE).to(x.dtype) for _ in range(2))
    rows, scores = x.detach(), torch.randn(len(x), tokens, device=DEVICE).to(x.dtype)

    def work() -> None:
        torch.mm(rows, keys.t())
        torch.mm(scores, values)
        torch.mm(rows, values.t())
        torch.mm(scores.t(), rows)
        torch.mm(scores.t(), rows)
        torch.mm(scores, keys)

    return work


def candidates(width: int, tokens: int, dtype: torch.dtype, kernels: PattentionKernels) -> dict[str, nn.Module]:
    """Return the modules by name, the MLP first."""
    modules = {"mlp": mlp(width, tokens)} | {norm: pattention(width, tokens, norm) for norm in NORMALIZATIONS}
    for module in modules.values():
        module.to(DEVICE, dtype)
        if isinstance(module, Pattention):
            module.kernels = kernels
    if kernels.name in ("compiled", "triton"):
        modules["mlp"] = torch.compile(modules["mlp"])
    return modules


def backends() -> list[PattentionKernels]:
    """Return the kernels that run on this device."""
    if DEVICE.type == "cpu":
        return [EagerKernels(), NativeKernels(), CompiledKernels()]
    from megatron_tf.kernels.triton_kernels import TritonKernels

    return [EagerKernels(), CompiledKernels(), TritonKernels()]


def main() -> None:
    """Print a line for each shape, dtype and backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    args = parser.parse_args()
    print(f"{DEVICE.type}, {torch.get_num_threads()} threads; time of the MLP, then ratios to it")
    for shape in SHAPES[DEVICE.type]:
        rows, width, tokens = shape
        for dtype in (torch.float32, torch.bfloat16):
            for kernels in backends():
                torch.compiler.reset()
                x = torch.randn(rows, width, device=DEVICE, dtype=dtype, requires_grad=True)
                dy = torch.randn(rows, width, device=DEVICE, dtype=dtype)
                modules = candidates(width, tokens, dtype, kernels)
                works = {name: training(module, x, dy) for name, module in modules.items()}
                works["bare products"] = products(width, tokens, x)
                for work in works.values():
                    seconds(work)
                turns = [{name: seconds(work) for name, work in works.items()} for _ in range(args.turns)]
                best = {name: min(turn[name] for turn in turns) for name in works}
                ratios = "  ".join(f"{name} {best[name] / best['mlp']:.3f}" for name in best if name != "mlp")
                kind = str(dtype).removeprefix("torch.")
                print(
                    f"{rows} x {width} x {tokens} {kind:<9}{kernels.name:<9}{best['mlp'] * 1e3:8.1f} ms  {ratios}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
