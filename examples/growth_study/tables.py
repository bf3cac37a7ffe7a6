"""The tables of the page, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median

from comparisons import Comparison, Evidence
from intervals import Interval, interval
from records import Results
from study import Study
from sweeps import choose

NONE = "–"
NOTHING_YET = "*No result yet.*"
TOPICS = {
    "operator": "operators for parameter tokens, at twice the model",
    "factor": "growth factors and numbers of stages",
    "when": "when to grow",
    "where": "where to grow, at equal parameters",
    "layers": "layers",
    "width": "width",
    "optimizer": "Adam state",
    "schedule": "learning-rate schedules",
    "rate": "half the learning rate",
    "control": "the controls: transformers",
}
"""The values of `topic` of grown arms."""


def all_tables(study: Study, results: Results) -> dict[str, str]:
    """Return every table of the page by its name."""
    evidence = Evidence(study, results)
    found = evidence.comparisons(arm for arm in study.arms.values() if arm.grow_from)
    better = evidence.against_better_baselines(study.arms.values())
    families = evidence.comparisons(arm for arm in study.arms.values() if arm.baseline and not arm.grow_from)
    tables = {topic: comparison_table([one for one in found if one.arm.topic == topic]) for topic in TOPICS}
    return {
        "answer": answer_table(study, found),
        **tables,
        "scratch": scratch_table(study, evidence),
        "better": family_table(better),
        "choices": choice_table(evidence.choices()),
        "families": family_table(families),
        "rates": rate_table(study, results),
        "sets": set_table(study, evidence),
        "rows": row_table(study, evidence),
        "losing": losing_table(found),
        "seeds": seed_list(found),
        "counts": counts(results),
    }


def answer_table(study: Study, found: Sequence[Comparison]) -> str:
    """List the differences of the arms of `answer`, a column for each way to grow, by model and budget."""
    column_of = {arm: column for column, arms in study.answer.items() for arm in arms}
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for one in found:
        if one.arm.name in column_of:
            compute = f", {one.ratio.mean:.2f} times" if one.ratio else ""
            cell = f"{shown(one.difference, '{:+.3f}')}{compute}"
            rows.setdefault((one.arm.compared_with, one.budget), {})[column_of[one.arm.name]] = cell
    body = [
        [baseline, f"{budget:g}", *(cells.get(column, NONE) for column in study.answer)]
        for (baseline, budget), cells in rows.items()
    ]
    return markdown(["from scratch", "tokens per parameter", *study.answer], body)


def comparison_table(found: Sequence[Comparison]) -> str:
    """Compare arms with their baselines; differences and ratios have 95 % intervals."""
    head = [
        "arm",
        "budget",
        "seeds",
        "loss",
        "difference at equal FLOPs",
        "FLOPs to equal loss",
        "given the small model",
    ]
    rows = []
    for one in found:
        recovery = f"{median(one.recovery):g} ({len(one.recovery)} of {one.grown})" if one.recovery else NONE
        values = [shown(one.difference), ratio(one), shown(one.given_small), shown(one.jump)]
        seeds = one.loss.count if one.loss else 0
        rows.append([one.arm.name, f"{one.budget:g}", str(seeds), mean(one.loss), *values, recovery])
    return markdown([*head, "jump", "steps to recover"], rows)


def scratch_table(study: Study, evidence: Evidence) -> str:
    """List the models trained from scratch."""
    rows = []
    for arm in study.arms.values():
        for budget in evidence.budgets(arm.name) if not arm.grow_from else []:
            results = evidence.at(arm.name, budget)
            first, loss = results[0], interval([result["loss"] for result in results])
            flops, speed = f"{first['flops']:.3g}", fmean(one["flops"] / max(one["seconds"], 0.1) for one in results)
            parameters = f"{first['parameters']:,}"
            rows.append(
                [arm.name, parameters, f"{budget:g}", str(len(results)), flops, shown(loss), f"{speed / 1e9:.1f}"]
            )
    return markdown(["arm", "parameters", "budget", "seeds", "FLOPs", "loss", "GFLOP/s a thread"], rows)


def family_table(found: Sequence[Comparison]) -> str:
    """Compare models with those of other arms from scratch at equal FLOPs."""
    rows = [
        [
            one.arm.name,
            one.arm.compared_with,
            f"{one.budget:g}",
            str(one.loss.count if one.loss else 0),
            shown(one.difference),
            ratio(one),
        ]
        for one in found
    ]
    return markdown(["arm", "against", "budget", "seeds", "difference at equal FLOPs", "FLOPs to equal loss"], rows)


def choice_table(found: Sequence[Comparison]) -> str:
    """Compare grown arms with others that differ in one choice."""
    rows = [
        [one.arm.name, one.arm.compared_with, f"{one.budget:g}", str(one.difference.count), shown(one.difference)]
        for one in found
        if one.difference
    ]
    return markdown(["arm", "instead of", "budget", "seeds", "difference at equal FLOPs"], rows)


def rate_table(study: Study, results: Results) -> str:
    """List the sweeps: the loss at each rate, and what they chose."""
    rows = []
    for arm in study.arms.values():
        choice = choose(study, results, arm.name) if arm.rate_of is None else None
        if choice is not None:
            losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in choice.losses.items())
            edge = " (at the edge of the grid)" if choice.is_at_edge else ""
            used = study.chosen_rates.get(arm.name)
            rows.append([arm.name, losses, f"{choice.rate:g}{edge}", NONE if used is None else f"{used:g}"])
    return markdown(["arm", "loss by rate", "lowest", "used"], rows)


def set_table(study: Study, evidence: Evidence) -> str:
    """List what growth and further training change by data set: the last loss minus that of the small run."""
    names = sorted({name for arm in evidence.points.values() for one in arm.values() for name in one["losses"]})
    rows = []
    for arm in study.arms.values():
        for budget in evidence.budgets(arm.name) if arm.grow_from else []:
            pairs = [(one, evidence.by_id.get(one["parent"])) for one in evidence.at(arm.name, budget)]
            changes = [
                interval([one["losses"][name] - small["losses"][name] for one, small in pairs if small])
                for name in names
            ]
            rows.append([arm.name, f"{budget:g}", *map(shown, changes)])
    return markdown(["arm", "budget", *names], rows)


def row_table(study: Study, evidence: Evidence) -> str:
    """List the share of the newest rows in the gradient, the update and the contribution after the last growth."""
    rows = []
    for arm in study.arms.values():
        for budget in evidence.budgets(arm.name) if arm.grow_from else []:
            results = [one for one in evidence.at(arm.name, budget) if one["rows"]]
            for number in range(min((len(one["rows"]) for one in results), default=0)):
                parts = [one["rows"][number] for one in results]
                step = parts[0][0] - results[0]["growth"][-1]
                shares = [
                    shown(interval([_share(part, quantity) for _, part in parts]), "{:.3f}")
                    for quantity in ("grad_norm", "update_norm", "contribution")
                ]
                dead = fmean(_sum_of_newest(part, "dead") / max(1, _sum_of_newest(part, "tokens")) for _, part in parts)
                rows.append([arm.name, f"{budget:g}", str(step), *shares, f"{dead:.1%}"])
    return markdown(["arm", "budget", "step after growth", "gradient", "update", "contribution", "dead"], rows)


def losing_table(found: Sequence[Comparison]) -> str:
    """List the arms that are clearly worse, and those that are clearly better, than their baseline at equal FLOPs."""
    rows = [
        [f"growing {verdict}", one.arm.name, f"{one.budget:g}", shown(one.difference), ratio(one)]
        for verdict in ("loses", "wins", "unclear")
        for one in found
        if one.verdict == verdict
    ]
    return markdown(["verdict", "arm", "budget", "difference at equal FLOPs", "FLOPs to equal loss"], rows)


def seed_list(found: Sequence[Comparison]) -> str:
    """Name the comparisons that need more seeds."""
    few = [f"{one.arm.name} at {one.budget:g}" for one in found if one.difference is None or one.difference.has_too_few]
    return f"Too few seeds for a conclusion: {', '.join(few)}." if few else "Every comparison has at least 3 seeds."


def counts(results: Results) -> str:
    """Say how many runs there are, and what they took."""
    final = sum(result["kind"] == "final" for result in results.by_id.values())
    hours = sum(result["seconds"] for result in results.by_id.values()) / 3600
    revisions = len({result["revision"] for result in results.by_id.values()})
    others = len(results.by_id) - final
    runs = f"{final} final runs, {others} of sweeps and small models"
    return f"{runs}; {hours:.1f} core-hours, {revisions} git revisions."


def shown(value: Interval | None, style: str = "{:.4f}") -> str:
    """Format a mean with its interval."""
    if value is None:
        return NONE
    if value.count == 1:
        return f"{style.format(value.mean)} (1 seed)"
    return f"{style.format(value.mean)} [{style.format(value.low)}, {style.format(value.high)}]"


def ratio(one: Comparison) -> str:
    """Format the ratio of FLOPs to equal loss, or say that the baseline does not get there."""
    if one.ratio is None and one.below_curve:
        return f"below the baseline's lowest loss ({one.below_curve} of {one.loss.count if one.loss else 0} seeds)"
    return shown(one.ratio, "{:.2f}")


def mean(value: Interval | None) -> str:
    """Format a mean alone."""
    return NONE if value is None else f"{value.mean:.4f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table; a sentence instead of one without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if lines else NOTHING_YET


def _share(rows: Mapping[str, Mapping[str, Mapping[str, float]]], quantity: str) -> float:
    """Return the norm over the newest rows as a share of that over all rows."""
    newest = max(rows)
    squares = {growth: sum(kind.get(quantity, 0.0) ** 2 for kind in kinds.values()) for growth, kinds in rows.items()}
    everything = sum(squares.values())
    return (squares[newest] / everything) ** 0.5 if everything else 0.0


def _sum_of_newest(rows: Mapping[str, Mapping[str, Mapping[str, float]]], quantity: str) -> float:
    return sum(kind.get(quantity, 0.0) for kind in rows[max(rows)].values())
