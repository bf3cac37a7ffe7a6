"""Generations: rows of parameters that the optimizer treats alike, because they have the same history of growth.

Adam's bias correction, 1 - beta^t, needs the number t of updates that the moments of *these* rows have accumulated:
with one count for the whole model, the first update of new rows would have a wrong size. So counts belong to
generations, one for each moment, as do the factors of the learning rate that growth sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.json_object import JsonObject


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the optimizer needs to know of some rows."""

    growth: int = 0
    """The growth that added them, counted from 1; 0 for rows of the original model."""
    exp_avg_steps: int = 0
    """Updates that their first Adam moment has accumulated."""
    exp_avg_sq_steps: int = 0
    """Updates that their second Adam moment has accumulated."""
    step_scale: float = 1.0
    """Factor of the Adam update, but not of weight decay: below 1 for copies that share a function."""
    lr_scale: float = 1.0
    """Factor of the learning rate; 0 freezes the rows, their moments and counts."""
    rewarmup_iters: int = 0
    """Updates over which the learning rate rises again after a growth."""
    rewarmup_done: int = 0
    """How many of them are done."""

    @property
    def is_frozen(self) -> bool:
        """Return whether the optimizer leaves the rows unchanged."""
        return self.lr_scale == 0

    @property
    def rewarmup(self) -> float:
        """Return the re-warm-up's factor of the learning rate at the next update."""
        is_done = self.rewarmup_done >= self.rewarmup_iters
        return 1.0 if is_done else (self.rewarmup_done + 1) / self.rewarmup_iters

    def rates(self, lr: float, weight_decay: float, *, beta1: float) -> tuple[float, float]:
        """Return the learning rate and weight decay of the next update, given those of the schedule.

        They are for an AdamW whose first moment decays by `beta1` and which counts the updates of the second moment.
        """
        scale = self.step_scale * self._first_moment_correction(beta1)
        # AdamW multiplies weight decay by lr, and decay is not scaled
        return lr * self.lr_scale * self.rewarmup * scale, weight_decay / scale

    def _first_moment_correction(self, beta1: float) -> float:
        """Return what an AdamW that counts the updates of the second moment leaves out for the first."""
        first, second = self.exp_avg_steps + 1, self.exp_avg_sq_steps + 1  # with the update to come
        return 1.0 if first == second else (1 - beta1**second) / (1 - beta1**first)

    def advanced(self) -> Self:
        """Return the generation after an update."""
        if self.is_frozen:
            return self
        return replace(
            self,
            exp_avg_steps=self.exp_avg_steps + 1,
            exp_avg_sq_steps=self.exp_avg_sq_steps + 1,
            rewarmup_done=min(self.rewarmup_done + 1, self.rewarmup_iters),
        )

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read an entry of the key `generations.table`."""
        rewarmup_iters = values.count("rewarmup_iters")
        return cls(
            growth=values.count("growth"),
            exp_avg_steps=values.count("exp_avg_steps"),
            exp_avg_sq_steps=values.count("exp_avg_sq_steps"),
            step_scale=values.positive("step_scale"),
            lr_scale=values.number("lr_scale", least=0),
            rewarmup_iters=rewarmup_iters,
            rewarmup_done=values.count("rewarmup_done", most=rewarmup_iters),
        )


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one tensor that belong to one generation."""

    count: int
    generation: Generation


@dataclass(frozen=True)
class Generations:
    """The generation of every row of every parameter."""

    table: tuple[Generation, ...]
    """All generations; the first is that of tensors that `rows` does not list."""
    rows: Mapping[str, tuple[tuple[int, int], ...]]
    """Name of a parameter -> (index in `table`, number of rows) of each of its runs, in row order."""

    @classmethod
    def original(cls, steps: int = 0) -> Self:
        """Return those of a model that has not grown, after `steps` updates."""
        return cls((Generation(exp_avg_steps=steps, exp_avg_sq_steps=steps),), {})

    @classmethod
    def of_runs(cls, runs: Mapping[str, Sequence[Run]]) -> Self:
        """Build them from the runs of every parameter of a model."""
        indices: dict[Generation, int] = {}
        rows = {}
        for name, parts in runs.items():
            merged: list[tuple[int, int]] = []
            for part in filter(lambda part: part.count, parts):
                index = indices.setdefault(part.generation, len(indices))
                if merged and merged[-1][0] == index:
                    merged[-1] = index, merged[-1][1] + part.count
                else:
                    merged.append((index, part.count))
            rows[name] = tuple(merged)
        listed = {name: parts for name, parts in rows.items() if any(index for index, _ in parts)}
        return cls(tuple(indices), listed)

    @property
    def are_original(self) -> bool:
        """Return whether a single count of updates describes all rows, as in a model that has not grown."""
        only = self.table[0]
        return not self.rows and only == Generations.original(only.exp_avg_steps).table[0]

    @property
    def rewarmup(self) -> float:
        """Return the highest factor of the learning rate at the next update."""
        return max(generation.rewarmup for generation in self.table)

    def runs(self, name: str, num_rows: int) -> list[Run]:
        """Return the runs of a parameter with `num_rows` rows, in row order."""
        if name not in self.rows:
            return [Run(num_rows, self.table[0])]
        return [Run(count, self.table[index]) for index, count in self.rows[name]]

    def slices(self, name: str, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Yield the runs within rows [start, stop) of a parameter: rows relative to `start`, and index in `table`."""
        first = 0
        for index, count in self.rows.get(name, ((0, stop),)):
            low, high = max(first, start), min(first + count, stop)
            if low < high:
                yield slice(low - start, high - start), index
            first += count

    def advanced(self) -> Self:
        """Return them after an update of all rows that are not frozen."""
        return replace(self, table=tuple(generation.advanced() for generation in self.table))

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """Return them for tensors with other numbers of rows, by name: the last run of each becomes shorter or longer.

        Used where rows at the end are padding.
        """
        rows = {}
        for name, parts in self.rows.items():
            *others, (index, count) = parts
            rows[name] = (*others, (index, count + sizes[name] - sum(count for _, count in parts)))
        return replace(self, rows=rows)

    def without_state(self) -> Self:
        """Return them without Adam moments: all counts are zero."""
        table = (replace(generation, exp_avg_steps=0, exp_avg_sq_steps=0) for generation in self.table)
        return replace(self, table=tuple(table))

    def check_rows(self, sizes: Mapping[str, int], source: object) -> None:
        """Raise CheckpointError naming the file `source` unless the runs match the number of rows of each parameter."""
        for name, parts in self.rows.items():
            total = sum(count for _, count in parts)
            if name not in sizes:
                raise CheckpointError(f"{source}: generations.rows names {name}, which is not a parameter of the model")
            if total != sizes[name]:
                raise CheckpointError(f"{source}: generations.rows of {name} cover {total} of its {sizes[name]} rows")

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `generations`."""
        table = tuple(Generation.from_json(entry) for entry in values.sections("table"))
        if not table:
            raise CheckpointError(f"{values.source}: {values.path}.table is empty")
        section = values.section("rows")
        rows = {}
        for name, parts in section.values.items():
            if not _are_runs(parts, len(table)):
                raise CheckpointError(
                    f"{values.source}: {section.path} of {name} is {parts!r}, expected [index in table, rows] of each "
                    f"run"
                )
            rows[name] = tuple((index, count) for index, count in parts)
        return cls(table, rows)

    def to_json(self) -> dict[str, Any]:
        """Return the value of the key `generations`."""
        return {
            "table": [asdict(generation) for generation in self.table],
            "rows": {name: [list(part) for part in parts] for name, parts in self.rows.items()},
        }


def _are_runs(parts: Any, num_generations: int) -> bool:
    if not isinstance(parts, list) or not parts:
        return False
    for part in parts:
        if not isinstance(part, list) or [type(value) for value in part] != [int, int]:
            return False
        index, count = part
        if not 0 <= index < num_generations or count < 1:
            return False
    return True
