"""What the results say about each arm: against its baseline from scratch, seed by seed, and around its growth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from intervals import Interval, Point, flops_at, interval, loss_at
from plan import SWEEP_SEED
from records import Result, Results
from study import Arm, Study


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm at one budget. None means that no seed has the value."""

    arm: Arm
    budget: float
    flops: float
    stage_flops: float
    loss: Interval | None
    difference: Interval | None
    """Loss minus that of the baseline at equal total FLOPs."""
    given_small: Interval | None
    """The same at the FLOPs of the last stage alone, as if the small model was free."""
    ratio: Interval | None
    """Total FLOPs over those at which the baseline has the same loss; below 1 the growth pays. None if a seed's loss is
    outside the curve: a mean over the others would be biased."""
    below_curve: int
    """Number of seeds with a lower loss than the baseline at any of its budgets."""
    jump: Interval | None
    """Loss right after the last growth minus that right before it."""
    recovery: Sequence[int]
    """Steps after which the loss is back at that before the growth, for each seed that gets there."""
    grown: int
    """Number of seeds with a growth."""

    @property
    def verdict(self) -> str:
        """Whether growing wins or loses at equal total FLOPs; unclear if the interval includes 0 or seeds are few."""
        found = self.difference
        if found is None or found.has_too_few or found.low <= 0 <= found.high:
            return "unclear"
        return "loses" if found.low > 0 else "wins"


class Evidence:
    """The final results of a study by arm, budget and seed."""

    def __init__(self, study: Study, results: Results) -> None:
        self.study = study
        self.by_id: Mapping[str, Result] = results.by_id
        self.points: dict[str, dict[tuple[float, int], Result]] = {}
        for result in results.by_id.values():
            # the small run of another arm is the point of an arm from scratch if it has its name
            if result["kind"] != "sweep" and result["seed"] != SWEEP_SEED and result["arm"] in study.arms:
                self.points.setdefault(result["arm"], {})[result["budget"], result["seed"]] = result

    def at(self, arm: str, budget: float) -> list[Result]:
        """Return the results of an arm at a budget, by seed."""
        found = self.points.get(arm, {})
        return [found[key] for key in sorted(found) if key[0] == budget]

    def budgets(self, arm: str) -> list[float]:
        """Return the budgets that an arm has results at."""
        return sorted({budget for budget, _ in self.points.get(arm, {})})

    def curve(self, arm: str, seed: int) -> list[Point]:
        """Return FLOPs and loss of an arm from scratch at its budgets, of one seed. Each point ends a whole decay."""
        points = self.points.get(arm, {}).items()
        return sorted((result["flops"], result["loss"]) for (_, of), result in points if of == seed)

    def comparisons(self, arms: Iterable[Arm]) -> list[Comparison]:
        """Compare grown arms, and those that name a baseline, with their baselines at each budget."""
        compared = [arm for arm in arms if arm.grow_from or arm.baseline]
        return [self._compare(arm, budget) for arm in compared for budget in self.budgets(arm.name)]

    def against_better_baselines(self, arms: Iterable[Arm]) -> list[Comparison]:
        """Compare grown arms with the models of `better_baselines` in place of their own baselines."""
        better = self.study.better_baselines
        grown = [arm for arm in arms if arm.grow_from and arm.compared_with in better]
        return self.comparisons(replace(arm, baseline=better[arm.compared_with]) for arm in grown)

    def choices(self) -> list[Comparison]:
        """Compare the arms of `choices` with each other, at the budgets of both."""
        arms = self.study.arms
        return self.comparisons(replace(arms[name], baseline=other) for name, other in self.study.choices)

    def _compare(self, arm: Arm, budget: float) -> Comparison:
        results = self.at(arm.name, budget)
        differences, given_small, ratios, below_curve = [], [], [], 0
        for result in results:
            curve = self.curve(arm.compared_with, result["seed"])
            same, free = loss_at(curve, result["flops"]), loss_at(curve, result["stage_flops"])
            reached = flops_at(curve, result["loss"])
            if same is not None:
                differences.append(result["loss"] - same)
            if free is not None:
                given_small.append(result["loss"] - free)
            if reached is not None:
                ratios.append(math.log(result["flops"] / reached))
            below_curve += bool(curve) and result["loss"] < min(loss for _, loss in curve)
        around = [found for result in results if (found := self.around_growth(result)) is not None]
        ratio = interval(ratios) if len(ratios) == len(results) else None
        return Comparison(
            arm=arm,
            budget=budget,
            flops=results[0]["flops"],
            stage_flops=results[0]["stage_flops"],
            loss=interval([result["loss"] for result in results]),
            difference=interval(differences),
            given_small=interval(given_small),
            ratio=ratio.exp() if ratio else None,
            below_curve=below_curve,
            jump=interval([jump for jump, _ in around]),
            recovery=[steps for _, steps in around if steps is not None],
            grown=len(around),
        )

    def around_growth(self, result: Result) -> tuple[float, int | None] | None:
        """Return the jump of the loss at the last growth, and the steps until it is undone; None if unknown."""
        if not result["growth"]:
            return None
        step = result["growth"][-1]
        losses = [(at, loss) for at, _, _, loss in result["evaluations"] if at >= step]
        at_growth = [loss for at, loss in losses if at == step]
        before = at_growth[0] if len(at_growth) > 1 else self._last_loss_of_parent(result, step)
        if before is None or not at_growth:
            return None
        after = [(at, loss) for at, loss in losses[len(at_growth) - 1 :]]
        recovered = next((at - step for at, loss in after if loss <= before), None)
        return at_growth[-1] - before, recovered

    def _last_loss_of_parent(self, result: Result, step: int) -> float | None:
        parent = self.by_id.get(result["parent"] or "")
        evaluations = parent["evaluations"] if parent else []
        return evaluations[-1][3] if evaluations and evaluations[-1][0] == step else None
