"""The figures of the page. Each arm has its own marker and line style, so that they are legible in black and white."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
from comparisons import Comparison, Evidence
from intervals import interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from study import Study

mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth_study", "font.family": "sans-serif"})
STYLES = [
    (marker, line) for line, marker in zip(cycle(["-", "--", ":", "-."]), "osD^v<>PX*phH8d1234+x|_", strict=False)
]


def draw_all(study: Study, evidence: Evidence, directory: Path) -> list[Path]:
    """Draw every figure; return the paths. The same results give the same bytes with the same matplotlib."""
    found = evidence.comparisons(arm for arm in study.arms.values() if arm.grow_from)
    figures: dict[str, Callable[[], Figure]] = {
        "loss": lambda: loss_figure(study, evidence),
        "difference": lambda: forest_figure(found, better=evidence.against_better_baselines(study.arms.values())),
        "recovery": lambda: recovery_figure(study, evidence),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in figures.items():
        paths.append(directory / f"{name}.svg")
        draw().savefig(paths[-1], metadata={"Date": None})
    return paths


def loss_figure(study: Study, evidence: Evidence) -> Figure:
    """Draw loss against total FLOPs, and next to it against those of the last stage, for the arms `at_a_glance`."""
    figure = Figure(figsize=(11, 5), layout="constrained", facecolor="white")
    whole, last = figure.subplots(1, 2, sharey=True)
    arms = [study.arms[name] for name in study.at_a_glance if evidence.budgets(name)]
    for number, (arm, style) in enumerate(zip(arms, cycle(STYLES), strict=False)):
        color = f"C{number}" if arm.grow_from else "0.35"
        for axes, key in ((whole, "flops"), (last, "stage_flops")):
            _curve(axes, evidence, arm.name, key=key, style=style, color=color)
    whole.set(xlabel="total FLOPs, those of the small model included", ylabel="held-out loss (nats per token)")
    last.set(xlabel="FLOPs of the last stage: given the small model")
    handles, labels = whole.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    for axes in (whole, last):
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.grid(alpha=0.25, which="both")
    return figure


def _curve(axes: Axes, evidence: Evidence, arm: str, *, key: str, style: tuple[str, str], color: str) -> None:
    """Draw the mean over seeds of an arm at its budgets, with intervals."""
    results = [evidence.at(arm, budget) for budget in evidence.budgets(arm)]
    means = [value for part in results if (value := interval([one["loss"] for one in part])) is not None]
    marker, line = style
    axes.errorbar(
        [part[0][key] for part in results],
        [value.mean for value in means],
        ([value.mean - value.low for value in means], [value.high - value.mean for value in means]),
        marker=marker,
        linestyle=line,
        color=color,
        capsize=3,
        label=arm,
        markersize=6,
    )


def forest_figure(found: Sequence[Comparison], *, better: Sequence[Comparison]) -> Figure:
    """Draw the difference to the baseline at equal total FLOPs with its interval, for each arm and budget; below it, in
    gray, that to the better baseline."""
    shown = [one for one in found if one.difference is not None]
    figure = Figure(figsize=(8, 1.8 + 0.34 * len(shown)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    places = {(one.arm.name, one.budget): place for place, one in enumerate(shown)}
    for one in shown:
        _difference(axes, one, place=places[one.arm.name, one.budget], marker="o", color="black")
    for one in better:
        if (one.arm.name, one.budget) in places and one.difference is not None:
            _difference(axes, one, place=places[one.arm.name, one.budget] + 0.35, marker="D", color="0.5")
    axes.set_yticks(range(len(shown)), [f"{one.arm.name}, {one.budget:g}" for one in shown])
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linestyle="--")
    axes.set_xlabel(
        "loss minus that from scratch at equal total FLOPs; left of 0 growing wins\n"
        "black: same initial values from scratch; gray: better ones; hollow: few seeds"
    )
    axes.grid(alpha=0.25, axis="x")
    return figure


def _difference(axes: Axes, one: Comparison, *, place: float, marker: str, color: str) -> None:
    value = one.difference
    assert value is not None
    error = [[value.mean - value.low], [value.high - value.mean]]
    face = "white" if value.has_too_few else color
    style = {"marker": marker, "markersize": 5, "color": color, "markerfacecolor": face, "capsize": 3}
    axes.errorbar(value.mean, place, xerr=error, **style)


def recovery_figure(study: Study, evidence: Evidence) -> Figure:
    """Draw the loss around the last growth of each grown main arm, minus that right before it, of its first seed."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for arm, (marker, line) in zip([arm for arm in study.arms.values() if arm.grow_from], cycle(STYLES), strict=False):
        results = [one for budget in evidence.budgets(arm.name)[:1] for one in evidence.at(arm.name, budget)][:1]
        for result in results if arm.main else []:
            around, step = evidence.around_growth(result), result["growth"][-1]
            if around is not None:
                after = {at - step: loss for at, _, _, loss in result["evaluations"] if at >= step}
                before = after[0] - around[0]
                heights = [loss - before for loss in after.values()]
                axes.plot([*after], heights, marker=marker, linestyle=line, label=f"{arm.name}, {result['budget']:g}")
    axes.set_xscale("symlog", linthresh=1)
    axes.set(xlabel="steps after the growth", ylabel="loss minus that right before the growth")
    axes.axhline(0, color="0.5", linewidth=1)
    axes.grid(alpha=0.25)
    if axes.lines[1:]:
        axes.legend(frameon=False, fontsize=8)
    return figure
