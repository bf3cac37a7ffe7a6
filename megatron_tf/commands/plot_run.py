"""Plot the loss of runs from their metrics files, one color per growth stage, and summarize them in a table.

A file that continues where the previous one ended is another stage of the same run; other files are separate runs.

Example:
    megatron-tf plot-run runs/small.jsonl --output loss.png --summary loss.md
"""

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.commands.arguments import file_path, make_parser, parse, read_text
from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_STEPS = 10
AXES = {
    "tokens": "tokens",
    "flops": "floating-point operations of the model",
    "device_hours": "hours of devices",
    "step": "steps",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    metrics: list[Path]
    x: str
    output: Path
    summary: Path | None
    title: str


@dataclass
class Stage:
    """The part of a run with one model and one layout."""

    parameters: int
    layout: dict[str, int]
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step -> metrics; for steps repeated after an interruption, the last ones."""
    validation: dict[int, float] = field(default_factory=dict)

    def series(self, key: str) -> list[float]:
        """Return one metric in the order of steps."""
        return [self.steps[step][key] for step in sorted(self.steps)]


@command()
def main(arguments: list[str] | None = None) -> int:
    """Plot the runs, and write the table if --summary is given."""
    parser = make_parser("plot-run", __doc__)
    add = parser.add_argument
    add(
        "metrics",
        nargs="+",
        type=file_path,
        help="metrics files (logging.metrics_file); those of one run in chronological order",
    )
    add("--x", choices=AXES, default="tokens", help="quantity on the x axis")
    add("--output", type=file_path, required=True, help="image file to write, such as loss.png")
    add("--summary", type=file_path, help="Markdown file to write the table to")
    add("--title", default="", help="title of the plot")
    options = parse(parser, Options, arguments)
    with needed_by("megatron-tf plot-run"):
        import_late("matplotlib.figure")
    stages: list[Stage] = []
    for path in options.metrics:
        stages += read_stages(path)
    draw(stages, options.output, title=options.title, x=options.x)
    table = summary_table(stages)
    print(table)
    if options.summary:
        options.summary.write_text(table + "\n")
    return 0


def read_stages(path: Path) -> list[Stage]:
    """Read the stages of a metrics file; each growth starts a new one. Raises UserError naming a malformed line."""
    stages: list[Stage] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            values: dict[str, Any] = json.loads(line)
            if values.get("event") in ("start", "growth"):
                stage = Stage(values["parameters"], values["layout"])
                if not stages or (stage.parameters, stage.layout) != (stages[-1].parameters, stages[-1].layout):
                    stages.append(stage)
            elif "event" in values:
                continue
            elif "validation_loss" in values:
                stages[-1].validation[values["step"]] = values["validation_loss"]
            else:
                stages[-1].steps[values["step"]] = values
        except (ValueError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{path}:{number}: not a line of metrics ({error})") from error
    stages = [stage for stage in stages if stage.steps]
    if not stages:
        raise UserError(f"{path} holds no training step")
    return stages


def draw(stages: list[Stage], output: Path, *, title: str, x: str = "tokens") -> None:
    """Plot the loss against `x`, with a color for each stage and a line at each growth.

    Raises UserError if the metrics lack `x`.
    """
    for stage in stages:
        if any(x not in values for values in stage.steps.values()):
            raise UserError(f"there are steps without {x!r} in the stage of {stage.parameters:,} parameters")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    # small inches and many dots: the labels stay readable where a page shows the picture at half its width
    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, stage in enumerate(stages):
        layout = ", ".join(f"{axis} {size}" for axis, size in stage.layout.items() if size > 1) or "one rank"
        color = f"C{number}"
        place, loss = stage.series(x), stage.series("loss")
        axes.plot(place, loss, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(place, smooth(loss), color=color, label=f"{stage.parameters / 1e6:.1f} M parameters ({layout})")
        points = [(stage.steps[step][x], loss) for step, loss in stage.validation.items() if step in stage.steps]
        axes.scatter([at for at, _ in points], [loss for _, loss in points], color=color, s=24, zorder=3)
    axes.scatter([], [], color="0.4", s=24, label="held-out text")
    for before, after in itertools.pairwise(stages):
        continues = min(after.series("tokens")) > max(before.series("tokens"))
        if before.parameters != after.parameters and continues:
            mark_growth(axes, before=before, after=after, x=x)
    axes.set(xlabel=AXES[x], ylabel="loss (nats per token)", title=title)
    if x in ("tokens", "flops"):
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, output, option="--output")


def mark_growth(axes: "Axes", *, before: Stage, after: Stage, x: str) -> None:
    """Draw a vertical line where the model has grown."""
    position = before.series(x)[-1]
    axes.axvline(position, color="0.3", linestyle="--", linewidth=1)
    text = f" grown: {before.parameters / 1e6:.1f} M to {after.parameters / 1e6:.1f} M"
    axes.text(position, 0.72, text, transform=axes.get_xaxis_transform(), va="top")


def smooth(values: list[float]) -> list[float]:
    """Average over the steps around each one, fewer at both ends: a mean over the last steps alone would lag behind."""
    half = SMOOTHING_STEPS // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def summary_table(stages: list[Stage]) -> str:
    """Format a Markdown table with one row per stage; first and last loss are means over 10 steps."""
    rows = [
        "| stage | layout (tp, pp, dp) | parameters | steps | tokens | first loss | last loss | held-out | rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, stage in enumerate(stages, 1):
        loss, tokens = stage.series("loss"), int(stage.series("tokens")[-1])
        layout = ", ".join(str(stage.layout[axis]) for axis in ("tp", "pp", "dp"))
        if "cp" in stage.layout:
            layout += f", cp {stage.layout['cp']}"
        held_out = f"{stage.validation[max(stage.validation)]:.3f}" if stage.validation else "-"
        rows.append(
            f"| {number} | {layout} | {stage.parameters:,} | {min(stage.steps)}-{max(stage.steps)} "
            f"| {tokens:,} | {statistics.fmean(loss[:10]):.3f} | {statistics.fmean(loss[-10:]):.3f} "
            f"| {held_out} | {statistics.median(stage.series('tokens_per_second')):,.0f} |"
        )
    return "\n".join(rows)
