"""The rule by which a learning rate is chosen: the one with the lowest held-out loss in the arm's sweep."""

from typing import NamedTuple

from records import Results
from study import Study


class Choice(NamedTuple):
    """The outcome of one arm's sweep."""

    rate: float
    losses: dict[float, float]
    """Held-out loss at each rate."""
    is_at_edge: bool
    """Whether a rate outside the grid might be better."""


def choose(study: Study, results: Results, arm: str) -> Choice | None:
    """Return the choice for an arm; None unless its sweep is complete."""
    grid = sorted(study.arms[arm].rates)
    sweep = [result for result in results.by_id.values() if (result["arm"], result["kind"]) == (arm, "sweep")]
    losses = {result["rate"]: result["loss"] for result in sweep if result["rate"] in grid}
    if len(losses) < len(grid):
        return None
    best = min(grid, key=lambda rate: (losses[rate], rate))
    return Choice(best, {rate: losses[rate] for rate in grid}, best in (grid[0], grid[-1]))


def describe_rates(study: Study, results: Results) -> str:
    """Return the lines of `chosen_rates:` for study.yaml, and the arms that still need a sweep."""
    lines = ["chosen_rates:"]
    missing = []
    for arm in study.arms.values():
        choice = choose(study, results, arm.name) if arm.rate_of is None else None
        if choice is not None:
            lines.append(f"  {arm.name}: {choice.rate:g}{'  # at the edge of the grid' if choice.is_at_edge else ''}")
        elif arm.rate_of is None:
            missing.append(arm.name)
    if missing:
        lines.append(f"# no complete sweep yet: {', '.join(missing)}")
    return "enter in study.yaml what the sweeps chose:\n" + "\n".join(lines)
