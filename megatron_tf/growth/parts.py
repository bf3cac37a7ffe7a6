"""Parts of a grown tensor: rows with the same origin, with their values, Adam moments and generations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from megatron_tf.checkpoint.columns import ColumnMap, ColumnNoise
from megatron_tf.checkpoint.generations import Generation, Run
from megatron_tf.checkpoint.transformed import Copy, Normal, Segment, SelectedRows, Zeros
from megatron_tf.config import GrowthStage

MODEL, FIRST, SECOND = "model", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a grown tensor."""

    segments: Mapping[str, Segment]
    """Group of the checkpoint -> how to make the rows there."""
    runs: Sequence[Run]
    """Generations of the rows."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Factors of rows that are copied."""

    value: float = 1.0
    """Of the parameter."""
    gradient: float = 1.0
    """Of its gradient after the growth, which is that of the first Adam moment; the second has its square."""
    step: float = 1.0
    """Of its Adam updates, so that growing commutes with an optimizer step."""

    def __mul__(self, other: "Scales") -> "Scales":
        """Return the factors of both."""
        return Scales(
            value=self.value * other.value, gradient=self.gradient * other.gradient, step=self.step * other.step
        )


@dataclass(frozen=True)
class PartMaker:
    """Makes parts under the options of a stage: Adam state, step scale, learning-rate scales and re-warm-up."""

    stage: GrowthStage
    growth: int
    """The number of this growth, from 1."""

    def copied(
        self,
        name: str,
        runs: Sequence[Run],
        *,
        start: int = 0,
        scales: Scales = Scales(),
        noise: Sequence[Normal] = (),
        columns: ColumnMap | None = None,
        column_noise: ColumnNoise | None = None,
        is_new: bool = False,
        is_in_layer: bool = True,
        has_moments: bool = True,
    ) -> Part:
        """Copy the rows of `runs`, those of tensor `name` from `start` on: old rows, or with `is_new` copies of them.

        Learning-rate scales apply to rows of the layers only. Without `has_moments` Adam moments start at zero.
        """
        count = sum(run.count for run in runs)
        keeps_first, keeps_second = self._keeps(is_new) if has_moments else (False, False)
        zeros = Zeros(count)
        copy = Copy(name, start, start + count, columns=columns)
        segments = {
            MODEL: replace(copy, scale=scales.value, noise=noise, column_noise=column_noise),
            FIRST: replace(copy, scale=scales.gradient) if keeps_first else zeros,
            SECOND: replace(copy, scale=scales.gradient**2) if keeps_second else zeros,
        }
        of_copies = partial(
            self._of_copies, keeps=(keeps_first, keeps_second), step=scales.step, is_new=is_new, is_in_layer=is_in_layer
        )
        return Part(segments, [Run(run.count, of_copies(run.generation)) for run in runs])

    def selected(
        self,
        name: str,
        rows: Tensor,
        *,
        generations: Sequence[Generation],
        scales: Sequence[Scales],
        noise: Sequence[Normal] = (),
        is_new: bool,
        has_moments: bool = True,
    ) -> Part:
        """Copy some rows of tensor `name` of a layer, in increasing order, each with its own generation and factors.

        The other arguments are those of `copied`.
        """
        keeps_first, keeps_second = self._keeps(is_new) if has_moments else (False, False)
        zeros = Zeros(len(rows))
        value, gradient = (
            torch.tensor([getattr(each, key) for each in scales], dtype=torch.float64) for key in ("value", "gradient")
        )
        segments = {
            MODEL: SelectedRows(name, rows=rows, scales=value, noise=noise),
            FIRST: SelectedRows(name, rows, gradient) if keeps_first else zeros,
            SECOND: SelectedRows(name, rows, gradient.square()) if keeps_second else zeros,
        }
        of_copies = partial(self._of_copies, keeps=(keeps_first, keeps_second), is_new=is_new, is_in_layer=True)
        runs = []
        steps = [each.step for each in scales]
        for (generation, step), alike in groupby(zip(generations, steps, strict=True)):
            runs.append(Run(sum(1 for _ in alike), of_copies(generation, step=step)))
        return Part(segments, runs)

    def drawn(self, values: Segment) -> Part:
        """Add new rows with these `values` and zero Adam moments."""
        count = len(values)
        generation = self._scheduled(Generation(growth=self.growth), is_new=True, is_in_layer=True)
        return Part({MODEL: values, FIRST: Zeros(count), SECOND: Zeros(count)}, [Run(count, generation)])

    def _of_copies(
        self, old: Generation, *, keeps: tuple[bool, bool], step: float, is_new: bool, is_in_layer: bool
    ) -> Generation:
        """Return the generation of copies of rows of generation `old`."""
        keeps_first, keeps_second = keeps
        generation = replace(
            old,
            growth=self.growth if is_new else old.growth,
            exp_avg_steps=old.exp_avg_steps if keeps_first else 0,
            exp_avg_sq_steps=old.exp_avg_sq_steps if keeps_second else 0,
            step_scale=old.step_scale * (step if self.stage.step_scale == "preserve" else 1.0),
        )
        return self._scheduled(generation, is_new=is_new, is_in_layer=is_in_layer)

    def _keeps(self, is_new: bool) -> tuple[bool, bool]:
        """Return whether copied rows keep their first and second Adam moments."""
        state = self.stage.adam_state
        keeps = state in ("keep", "reset_second") or (state == "reset_new" and not is_new)
        return keeps, keeps and state != "reset_second"

    def _scheduled(self, generation: Generation, *, is_new: bool, is_in_layer: bool) -> Generation:
        """Return the generation with the stage's learning-rate scale and re-warm-up."""
        stage = self.stage
        scale = 1.0
        if is_in_layer:
            scale = stage.new_tokens_lr_scale if is_new else stage.old_tokens_lr_scale
        # a re-warm-up in progress continues unless the stage has its own
        is_restarted = stage.rewarmup_iters > 0 or generation.rewarmup == 1
        if is_restarted and (is_new or stage.rewarmup == "all"):
            generation = replace(generation, rewarmup_iters=stage.rewarmup_iters, rewarmup_done=0)
        return replace(generation, lr_scale=scale)


def rows_of(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """Return the runs of rows [start, stop) of a tensor."""
    found = []
    first = 0
    for run in runs:
        low, high = max(start, first), min(stop, first + run.count)
        if low < high:
            found.append(Run(high - low, run.generation))
        first += run.count
    return found


def total_rows(parts: Iterable[Part]) -> int:
    """Return the number of rows of some parts."""
    return sum(run.count for part in parts for run in part.runs)
