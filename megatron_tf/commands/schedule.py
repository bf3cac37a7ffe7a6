"""Show the pipeline schedule of a configuration: which rank computes what at which time, and how long it waits.

Each row is a rank, each column a unit of time. F is a forward, B a backward, I and W its halves: the gradient of the
input, and those of the parameters. The number is that of the micro-batch, and a letter in front names the stage of the
rank. The times are those of --costs, and messages take none. The bubble is the part of the time that ranks wait, next
to the formula of the schedule's paper.

Example:
    megatron-tf schedule examples/configs/tokenformer_1.5b.yaml --parallel.pipeline_model_parallel_size=4 \\
        --parallel.pipeline_schedule=zbv
"""

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.commands.arguments import file_path, make_parser
from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.figures import save_figure

if TYPE_CHECKING:
    from megatron_tf.config import RunConfig
    from megatron_tf.parallel.timeline import Costs, Pipeline, Slot

_COLORS = {"F": "C0", "B": "C1", "I": "C2", "W": "C4"}


@command()
def main(arguments: list[str] | None = None) -> int:
    """Print the picture and the bubble. Returns 0."""
    parser = make_parser("schedule", __doc__)
    add = parser.add_argument
    add(
        "config",
        type=file_path,
        help="YAML configuration of a run, with overrides --section.key=value; data and tokenizer are not read",
    )
    add("--costs", default="1:1:1", metavar="F:I:W", help="time of each pass through a stage")
    add("--world-size", type=int, metavar="RANKS", help="number of ranks; by default one data-parallel replica")
    add("--plot", type=file_path, help="image file to draw the schedule into, such as schedule.png")
    options, overrides = parser.parse_known_args(arguments)
    times = options.costs.split(":")
    if len(times) != 3 or not all(time.isdecimal() and int(time) for time in times):
        parser.error(f"--costs is {options.costs!r}: write three whole numbers above 0, such as 2:2:2")
    if options.plot is not None:
        with needed_by("megatron-tf schedule --plot"):
            import_late("matplotlib.figure")
    from megatron_tf.config import load_config

    config = load_config(options.config, overrides)
    import_late("megatron_tf.parallel.timeline")
    from megatron_tf.parallel.timeline import Costs, timeline

    pipeline, costs = _pipeline(config, options.world_size), Costs(*map(int, times))
    slots = timeline(pipeline, costs)
    print("\n".join(report(pipeline, costs, slots)))
    if options.plot is not None:
        draw(pipeline, slots, options.plot)
    return 0


def _pipeline(config: "RunConfig", world_size: int | None) -> "Pipeline":
    """Return the pipeline of the run's first stage of growth. Raises UserError if it does not fit the ranks."""
    from megatron_tf.parallel.mesh import replicas_of
    from megatron_tf.parallel.timeline import Pipeline
    from megatron_tf.training.step.batch_sizes import check_batch_sizes

    config = config.at_stage(0)
    parallel, training = config.parallel, config.training
    tensor, ranks = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if ranks == 1:
        raise UserError("parallel.pipeline_model_parallel_size is 1, so there is no schedule: set it to 2 or more")
    smallest = tensor * ranks * parallel.context_parallel_size * (parallel.data_parallel_size or 1)
    data = replicas_of(parallel, world_size or smallest)
    check_batch_sizes(config, ranks, data)
    count = training.global_batch_size // (training.micro_batch_size * data)
    return Pipeline(parallel.pipeline_schedule, ranks, per_rank=parallel.stages_per_rank, micro_batches=count)


def report(pipeline: "Pipeline", costs: "Costs", slots: "list[Slot]") -> list[str]:
    """Return the lines of the picture and of its summary."""
    from megatron_tf.parallel.timeline import bubble_fraction, theoretical_bubble_fraction

    end = max(slot.stop for slot in slots)
    placed = [",".join(map(str, pipeline.stages_of(rank))) for rank in range(pipeline.ranks)]
    return [
        f"{pipeline.schedule}: {pipeline.ranks} ranks with {pipeline.per_rank} stage(s) each, "
        f"{pipeline.micro_batches} micro-batches, {end} units of time",
        *picture(pipeline, slots),
        f"stages of the ranks: {' | '.join(placed)}",
        f"bubble {bubble_fraction(slots):.2%}, by formula {theoretical_bubble_fraction(pipeline, costs):.2%}",
    ]


def picture(pipeline: "Pipeline", slots: "list[Slot]") -> list[str]:
    """Draw a line of text for each rank; a dot is a unit of time that it waits."""
    labels = {slot: label(pipeline, slot) for slot in slots}
    width = max(map(len, labels.values())) + 1
    lines = []
    for rank in range(pipeline.ranks):
        line, now = f"rank {rank:<3}", 0
        for slot in (slot for slot in slots if slot.rank == rank):
            line += ".".ljust(width) * (slot.start - now)
            line += labels[slot].ljust(width * (slot.stop - slot.start) - 1, "-") + " "
            now = slot.stop
        lines.append(line.rstrip())
    return lines


def label(pipeline: "Pipeline", slot: "Slot") -> str:
    """Return a short name of an action, with a letter for the stage if a rank has several."""
    action = slot.action
    turn = string.ascii_lowercase[action.stage // pipeline.ranks % 26] if pipeline.per_rank > 1 else ""
    return f"{turn}{action.kind}{action.micro_batch}"


def draw(pipeline: "Pipeline", slots: "list[Slot]", output: Path) -> None:
    """Draw the schedule as bars of time, darker for each further stage of a rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.6 * pipeline.ranks + 1.2), dpi=150, layout="constrained")
    axes: Any = figure.add_subplot()
    for slot in slots:
        turn = slot.action.stage // pipeline.ranks
        alpha = 0.35 + 0.6 * turn / max(1, pipeline.per_rank - 1)
        where = (slot.start, slot.stop - slot.start)
        axes.broken_barh([where], (slot.rank - 0.4, 0.8), color=_COLORS[slot.action.kind], alpha=alpha)
        middle = (slot.start + slot.stop) / 2
        axes.text(middle, slot.rank, str(slot.action.micro_batch), ha="center", va="center", fontsize=6)
    for kind, color in _COLORS.items():
        axes.broken_barh([], (0, 0), color=color, label=kind)
    axes.set(xlabel="time", ylabel="rank", title=pipeline.schedule, yticks=range(pipeline.ranks))
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(_COLORS))
    save_figure(figure, output, option="--plot")
