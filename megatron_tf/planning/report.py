"""Plans as text, JSON values and a picture."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tf.figures import save_figure
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.plan import Plan, Ranking, SizedLayout, busiest_messages
from megatron_tf.planning.stages import Course, StageRanking, best_course, hours_from_scratch, one_layout

_GIB = 2**30
_HEADER = " tp  cp  pp   dp shard  schedule                 micro-batch  recompute   micro-batches"
_TIMES = ("compute", "tensor", "context", "pipeline", "data", "bubble", "update")


def layout_columns(sized: SizedLayout) -> str:
    """Return a layout as columns of a table."""
    planned = sized.planned
    layout, parallel, training = planned.layout, planned.config.parallel, planned.config.training
    schedule = "-"
    if layout.pipeline > 1:
        schedule = f"{parallel.pipeline_schedule}, v={parallel.stages_per_rank}"
    return (
        f"{layout.tensor:>3} {_context(sized):>3} {layout.pipeline:>3} {layout.data:>4} {layout.shard_size:>5}  "
        f"{schedule:<26}"
        f"{training.micro_batch_size:>10}  {training.recompute_granularity:<11}{planned.micro_batches:>14}"
    )


def _context(sized: SizedLayout) -> str:
    """Return the context-parallel size, with an `a` if it exchanges tokens for heads instead of using a ring."""
    planned = sized.planned
    is_exchange = planned.layout.context > 1 and planned.config.parallel.context_parallel_method == "all_to_all"
    return f"{planned.layout.context}{'a' if is_exchange else ''}"


def ranking_lines(ranking: Ranking, counter: PartCounter, *, top: int) -> list[str]:
    """Return the tables of one model: the fastest layouts, why the first one wins, and what does not fit."""
    count, missing = len(ranking.fitting), len(ranking.too_large)
    impossible = sum(ranking.impossible.values())
    lines = [f"{count} layouts fit, {missing} lack memory, {impossible} are impossible"]
    if ranking.fitting:
        lines += ["", f"{'s/step':>8} {'tokens/s':>12} {'TFLOP/s':>8} {'peak GiB':>9} {_HEADER}"]
        lines += [_plan_line(plan) for plan in ranking.fitting[:top]]
        lines += ["", *explain(ranking, counter)]
    if ranking.too_large:
        lines += ["", "what does not fit, by the memory that the fullest rank lacks", f"{'lacks GiB':>9} {_HEADER}"]
        lines += [f"{each.missing_bytes / _GIB:>9.1f} {layout_columns(each)}" for each in ranking.too_large[:top]]
    for reason, times in sorted(ranking.impossible.items(), key=lambda item: -item[1])[:top]:
        lines.append(f"impossible, {times} times: {reason}")
    return lines


def _plan_line(plan: Plan) -> str:
    rate = plan.tokens_per_step / plan.time.total
    return (
        f"{plan.time.total:>8.3f} {rate:>12,.0f} {plan.model_flops_per_second / 1e12:>8.2f} "
        f"{plan.peak.bytes / _GIB:>9.2f} {layout_columns(plan)}"
    )


def explain(ranking: Ranking, counter: PartCounter) -> list[str]:
    """Say where the time and the memory of the fastest layout go, and what it exchanges."""
    plan = ranking.fitting[0]
    seconds = {name: getattr(plan.time, name) for name in _TIMES}
    parts = [f"{name} {value:.3f} s ({value / plan.time.total:.1%})" for name, value in seconds.items() if value]
    kinds = sorted(plan.peak.kinds.items(), key=lambda item: -item[1])
    memory = [f"{kind} {size / _GIB:.2f}" for kind, size in kinds if size]
    lines = [
        "the first one: time of its busiest rank: " + ", ".join(parts),
        f"memory of its fullest rank ({plan.peak.rank} of the pipeline), GiB: " + ", ".join(memory),
    ]
    for each in busiest_messages(plan, counter):
        lines.append(f"messages of a step: {each.axis} {each.kind}, {each.calls:,} calls, {each.bytes / 1e9:.3f} GB")
    return lines


def stages_lines(stages: Sequence[StageRanking], *, restart_hours: float) -> list[str]:
    """Return the table of the growth stages, and what the run costs against the final model from scratch."""
    lines = ["", f"{'stage':>5} {'parameters':>15} {'steps':>16} {'device hours':>13} {_HEADER}"]
    best, fixed = best_course(stages, restart_hours=restart_hours), one_layout(stages)
    if best is None:
        return [*lines, "a stage fits no layout: see above by how much"]
    for stage, plan in zip(stages, best.plans, strict=True):
        steps = f"{stage.steps.start:,}-{stage.steps.stop:,}"
        hours = stage.hours(plan)
        lines.append(f"{stage.number:>5} {stage.parameters:>15,} {steps:>16} {hours:>13,.2f} {layout_columns(plan)}")
    lines.append(f"total {best.hours:,.2f} device hours; {_changes(best, fixed)}")
    scratch = hours_from_scratch(stages)
    if scratch is not None and len(stages) > 1:
        share, count = best.hours / scratch, sum(len(stage.steps) for stage in stages)
        lines += [
            f"the final model from scratch, for as many steps: {scratch:,.2f} device hours; growing takes "
            f"{share:.1%} of that",
            f"in the same hours it is trained for {share * count:,.0f} steps: docs/growth_study.md compares the losses",
        ]
    return lines


def _changes(best: Course, fixed: Course | None) -> str:
    if best.restarts:
        stages = [i for i in range(1, len(best.plans)) if best.plans[i].keys != best.plans[i - 1].keys]
        names = ", ".join(map(str, stages))
        without = (
            f"{fixed.hours - best.hours:,.2f} more" if fixed is not None else "impossible: no layout fits all stages"
        )
        return f"change the layout at stage {names}; without a change {without}"
    return "one layout for all stages: no change pays for its restart"


def to_json(stages: Sequence[StageRanking], counter: PartCounter, *, top: int, restart_hours: float) -> dict[str, Any]:
    """Return everything that the tables show as JSON values; sizes in bytes, times in seconds."""
    best, fixed = best_course(stages, restart_hours=restart_hours), one_layout(stages)
    return {
        "stages": [_stage_json(stage, counter, top=top) for stage in stages],
        "course": None if best is None else _course_json(best),
        "one_layout": None if fixed is None else _course_json(fixed),
        "from_scratch_device_hours": hours_from_scratch(stages),
    }


def _course_json(course: Course) -> dict[str, Any]:
    keys = [plan.keys for plan in course.plans]
    return {"device_hours": course.hours, "restarts": course.restarts, "layouts": keys}


def _stage_json(stage: StageRanking, counter: PartCounter, *, top: int) -> dict[str, Any]:
    ranking = stage.ranking
    return {
        "stage": stage.number,
        "parameters": stage.parameters,
        "first_step": stage.steps.start,
        "steps": len(stage.steps),
        "fitting": [_plan_json(plan, counter) for plan in ranking.fitting[:top]],
        "too_large": [_sized_json(each) | {"missing_bytes": each.missing_bytes} for each in ranking.too_large[:top]],
        "impossible": dict(ranking.impossible),
    }


def _sized_json(sized: SizedLayout) -> dict[str, Any]:
    layout = dataclasses.asdict(sized.planned.layout)
    peak = {"rank": sized.peak.rank, "bytes": sized.peak.bytes, "kinds": dict(sized.peak.kinds)}
    return {"layout": layout, "keys": sized.keys, "micro_batches": sized.planned.micro_batches, "peak": peak}


def _plan_json(plan: Plan, counter: PartCounter) -> dict[str, Any]:
    return _sized_json(plan) | {
        "seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "messages": [dataclasses.asdict(each) for each in busiest_messages(plan, counter)],
    }


def draw(stages: Sequence[StageRanking], output: Path, *, top: int) -> None:
    """Draw the parts of the time and the memory of the fastest layouts of every stage, as bars.

    Raises UserError if the suffix of `output` is not an image format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.3 * top * len(stages) + 1.5), dpi=150, layout="constrained")
    axes: Any = figure.subplots(len(stages), 2, squeeze=False)
    for row, stage in zip(axes, stages, strict=True):
        plans = stage.ranking.fitting[:top]
        labels = [_label(plan) for plan in plans]
        kinds = sorted({kind for plan in plans for kind in plan.peak.kinds})
        _bars(row[0], labels, {name: [getattr(plan.time, name) for plan in plans] for name in _TIMES})
        _bars(row[1], labels, {kind: [plan.peak.kinds.get(kind, 0) / _GIB for plan in plans] for kind in kinds})
        row[1].axvline(stage.ranking.cluster.memory_gib, color="0.3", linestyle="--", linewidth=1)
        row[1].set_yticklabels([])
        row[0].set(xlabel="seconds of a step", title=f"{stage.parameters:,} parameters")
        row[1].set(xlabel="GiB of the fullest rank")
    save_figure(figure, output, option="--plot")


def _label(plan: Plan) -> str:
    layout, training = plan.planned.layout, plan.planned.config.training
    mesh = f"tp {layout.tensor} cp {_context(plan)} pp {layout.pipeline} dp {layout.data}/{layout.shard_size}"
    return f"{mesh}, {training.micro_batch_size}, {training.recompute_granularity}"


def _bars(axes: Any, labels: Sequence[str], series: dict[str, list[float]]) -> None:
    places, ends = list(range(len(labels))), [0.0] * len(labels)
    for name, values in series.items():
        axes.barh(places, values, left=ends, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_yticks(places, labels, fontsize=6)
    axes.invert_yaxis()
    axes.legend(fontsize=6, frameon=False)
