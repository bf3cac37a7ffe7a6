"""Normalization of a Pattention's scores in Triton, between its matrix products.

The kernels are memory-bound. With R rows of n tokens, forward moves 2 R n elements and backward 4 R n if a row has at
most LARGEST_HELD_ROW tokens, since each score is then read once. Longer rows are read a second time from a cache; rows
that are sharded over ranks, from memory.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from megatron_tf.kernels import triton_programs as programs
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.tokenformer.normalization import Normalization, Reduce

LARGEST_HELD_ROW = 16384
"""Longest row that fits in registers: up to 64 tokens per thread in forward, 32 in backward (more state per token)."""
FORWARD_PARTS = 8
"""Maximum blocks per row in forward: with eight elements of each, a thread uses 64 to 96 registers on sm_90."""
BACKWARD_PARTS = 4
"""Maximum blocks per row in backward: a thread uses 128 registers, so that 16 warps are resident; more would spill."""
_SMALLEST_BLOCK = 64  # a cache line of a 16-bit type
_WARP = 256  # elements: 32 threads with 8 each (16 bytes of a 16-bit type)
_FEWEST_WARPS = 4
_NORMS = {
    "l2_norm_gelu": programs.L2_NORM_GELU,
    "gelu_l2_norm": programs.GELU_L2_NORM,
    "softmax": programs.SOFTMAX,
}


@dataclass(frozen=True)
class Tile:
    """The part of the scores that one program handles."""

    rows: int
    """Rows per program, a power of 2."""
    block: int
    """Columns per block, a power of 2."""
    parts: int
    """Blocks per row."""
    warps: int
    """Warps per program: each thread holds eight elements of a block."""


def choose_tile(n: int, most_parts: int) -> Tile:
    """Choose the tile for rows of n tokens, with at most `most_parts` blocks per row if the row fits in registers.

    Several blocks, because n is not a power of 2 in general: up to half of one block of the next power would be idle.
    Rows too short for four warps share a program.
    """
    held = min(triton.next_power_of_2(n), LARGEST_HELD_ROW)
    block = max(_SMALLEST_BLOCK, held // most_parts)
    warps = max(_FEWEST_WARPS, block // _WARP)
    return Tile(rows=warps * _WARP // block, block=block, parts=triton.cdiv(n, block), warps=warps)


class TritonKernels(PattentionKernels):
    """Triton kernels; fp64 falls back to the eager kernels."""

    name: ClassVar[str] = "triton"

    def forward(
        self, norm: Normalization, scores: Tensor, *, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        if scores.dtype == torch.float64:
            return EagerKernels().forward(norm, scores, tau=tau, reduce=reduce)
        tau = tau.to(torch.float32).contiguous()
        factor, weights = torch.empty_like(tau), torch.empty_like(scores)
        launch = _Launch(norm, scores, FORWARD_PARTS)
        if reduce is not None:
            statistic = torch.empty_like(tau)
            launch.rows(programs.statistic_part, statistic=statistic)
            statistic = reduce(statistic)
            launch.blocks(programs.weights_part, statistic=statistic, tau=tau, factor=factor, weights=weights)
        elif launch.holds_row:
            launch.rows(programs.forward_held, tau=tau, factor=factor, weights=weights, PARTS=launch.tile.parts)
        else:
            launch.rows(programs.forward_long, tau=tau, factor=factor, weights=weights)
        return factor, weights

    def backward(
        self, norm: Normalization, scores: Tensor, *, factor: Tensor, grad: Tensor, tau: Tensor, reduce: Reduce | None
    ) -> tuple[Tensor, Tensor]:
        if scores.dtype == torch.float64:
            return EagerKernels().backward(norm, scores, factor=factor, grad=grad, tau=tau, reduce=reduce)
        tau = tau.to(torch.float32).contiguous()
        weights = torch.empty_like(scores)
        launch = _Launch(norm, scores, BACKWARD_PARTS)
        given = {"factor": factor, "grad": grad}
        if reduce is not None:
            inner = torch.empty_like(factor)
            launch.rows(programs.inner_part, **given, weights=weights, inner=inner)
            launch.blocks(programs.gradient_part, **given, inner=reduce(inner), tau=tau)
        elif launch.holds_row:
            launch.rows(programs.backward_held, **given, tau=tau, weights=weights, PARTS=launch.tile.parts)
        else:
            launch.rows(programs.backward_long, **given, tau=tau, weights=weights)
        return weights, grad


class _Launch:
    """Launches programs over scores [R, n]."""

    def __init__(self, norm: Normalization, scores: Tensor, most_parts: int) -> None:
        count, n = scores.shape
        self.count = count
        self.tile = choose_tile(n, most_parts)
        self.holds_row = n <= LARGEST_HELD_ROW
        # n is a compile-time constant, so that aligned loads become 16 bytes wide; only growth changes it in a run
        self.common = {
            "scores": scores,
            "count": count,
            "n": n,
            "NORM": _NORMS[norm.name],
            "ROWS": self.tile.rows,
            "BLOCK": self.tile.block,
            "num_warps": self.tile.warps,
        }

    def rows(self, program: Any, **arguments: Tensor | int) -> None:
        """Launch one program per `tile.rows` rows; `arguments` are those besides the scores and the tile."""
        grid = (triton.cdiv(self.count, self.tile.rows),)
        program[grid](**self.common, **arguments)

    def blocks(self, program: Any, **arguments: Tensor) -> None:
        """Launch one program per block of `tile.rows` rows."""
        grid = triton.cdiv(self.count, self.tile.rows), self.tile.parts
        program[grid](**self.common, **arguments)
