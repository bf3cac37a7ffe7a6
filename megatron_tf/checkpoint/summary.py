"""Summarizes the tensors of a checkpoint, and finds differences between two checkpoints."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks


@dataclass(frozen=True)
class PatternSummary:
    """Tensors of a group whose names differ only in the layer."""

    pattern: str
    """Their name, with * in place of the layer's index."""
    num_tensors: int
    shape: str
    dtype: torch.dtype
    parameters: int
    norm: float
    """Euclidean norm over all of them."""


def names_by_pattern(checkpoint: Checkpoint, group: str) -> dict[str, list[str]]:
    """Group tensors whose names differ only in the layer: pattern -> names, in the model's order."""
    names: dict[str, list[str]] = {}
    for parameter in held_parameters(checkpoint, group):
        names.setdefault(parameter.pattern, []).append(parameter.name)
    return names


def common_shape(shapes: Sequence[tuple[int, ...]]) -> str:
    """Format the shapes of tensors that differ at most in their number of rows: "64 x 512", or "64..96 x 512"."""
    rows = sorted({shape[0] for shape in shapes})
    first = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]}..{rows[-1]}"
    return " x ".join([first, *map(str, shapes[0][1:])])


def summarize(checkpoint: Checkpoint, group: str) -> list[PatternSummary]:
    """Summarize a group by pattern, in the model's order; reads all of it, in blocks."""
    summaries = []
    for pattern, names in names_by_pattern(checkpoint, group).items():
        shapes = [checkpoint.shape(group, name) for name in names]
        squares = sum(_square_sum(checkpoint, group, name) for name in names)
        summary = PatternSummary(
            pattern=pattern,
            num_tensors=len(names),
            shape=common_shape(shapes),
            dtype=checkpoint.dtype(group, names[0]),
            parameters=sum(map(math.prod, shapes)),
            norm=math.sqrt(squares),
        )
        summaries.append(summary)
    return summaries


def differences(
    left: Checkpoint, right: Checkpoint, progress: Callable[[int], object] = lambda num_bytes: None
) -> Iterator[str]:
    """Yield a line for every tensor that is not bitwise equal in both checkpoints, whatever their layouts.

    `progress` is called with the bytes of `left` compared since its last call.
    """
    groups = [*left.groups(), *(group for group in right.groups() if group not in left.groups())]
    for group in groups:
        names = left.names(group)
        for name in [*names, *sorted(set(right.names(group)) - set(names))]:
            if difference := _difference(left, right, group=group, name=name, progress=progress):
                yield f"{group} {name}: {difference}"


def _difference(
    left: Checkpoint, right: Checkpoint, *, group: str, name: str, progress: Callable[[int], object]
) -> str | None:
    for here, there in ((left, right), (right, left)):
        if name not in here.names(group):
            return f"only in {there.directory}"
    shape, other_shape = left.shape(group, name), right.shape(group, name)
    dtype, other_dtype = left.dtype(group, name), right.dtype(group, name)
    if (shape, dtype) != (other_shape, other_dtype):
        return f"{list(shape)} {dtype} against {list(other_shape)} {other_dtype}"
    sides = (read_blocks(checkpoint, group, name) for checkpoint in (left, right))
    count = 0
    for one, other in zip(*sides, strict=True):
        count += _differing_values(one, other)
        progress(one.nbytes)
    return f"{count} of {math.prod(shape)} values differ" if count else None


def _differing_values(left: Tensor, right: Tensor) -> int:
    """Count the values of two tensors of one type that differ by their bytes: a NaN equals the same NaN."""
    size = left.element_size()
    same_bytes = left.flatten().view(torch.uint8) == right.flatten().view(torch.uint8)
    return int((~same_bytes).view(-1, size).any(dim=1).sum())


def _square_sum(checkpoint: Checkpoint, group: str, name: str) -> float:
    return sum(float(block.double().square().sum()) for block in read_blocks(checkpoint, group, name))
