"""Rank all layouts of a configuration on a cluster by the predicted time of a step, and say which ones do not fit.

A layout is a choice of the tensor-, pipeline-, context- and data-parallel size, the pipeline schedule, how many ranks
share one copy of the parameters, the micro-batch size, and what is recomputed. The memory and the messages of each
layout are composed of parts of the model that the trainer's code runs on tensors without values; times follow from the
rates of the cluster. For a run that grows, every stage is planned, and compared with training the final model from
scratch.

A cluster is a preset, or a YAML file (docs/scaling.md describes its keys). --write saves the run with the layout that
fits all stages in the fewest device hours.

Example:
    megatron-tf plan examples/configs/tokenformer_1.5b.yaml --cluster 8xH100 --write run.yaml
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_tf.commands.arguments import file_path, make_folder_of, make_parser
from megatron_tf.commands.progress import tracked
from megatron_tf.commands.runner import command, import_late, say
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.host import usable_memory

if TYPE_CHECKING:
    from megatron_tf.planning.cluster import Cluster
    from megatron_tf.planning.counts import PartCounter
    from megatron_tf.planning.rates import Machine
    from megatron_tf.planning.stages import StageRanking


_MALLOC_OVERHEAD = 1.4
"""A process over its tensors: malloc keeps what it cannot return (docs/scaling.md)."""


@command(less_memory="plan fewer ranks")
def main(arguments: list[str] | None = None) -> int:
    """Print the plans. Returns 0, or 1 if a stage fits no layout."""
    parser = make_parser("plan", __doc__)
    add = parser.add_argument
    add(
        "config",
        type=file_path,
        help="YAML configuration of a run, with overrides --section.key=value; data and tokenizer are not read",
    )
    add("--cluster", default="8xH100", help="preset, or YAML file of a cluster; an unknown name lists the presets")
    add(
        "--calibrate",
        type=int,
        metavar="RANKS",
        help="plan for 1 or 2 ranks on this machine's CPU instead of a cluster: measure the parts of the model, the "
        "optimizer and gloo (with OMP_NUM_THREADS as the run will have it)",
    )
    add("--top", type=int, default=10, metavar="N", help="number of layouts in each table")
    add(
        "--restart-minutes",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="time that a change of the layout takes: saving, queueing, starting",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", type=file_path, help="image file to draw the times and the memory into, such as plan.png")
    add("--write", type=file_path, help="write the run with the best layout to this new YAML file")
    options, overrides = parser.parse_known_args(arguments)
    if options.top < 1:
        parser.error(f"--top is {options.top}: it must be 1 or more")
    if options.calibrate not in (None, 1, 2):
        parser.error(f"--calibrate is {options.calibrate}: it must be 1 or 2")
    if not 0 <= options.restart_minutes < 10**6:
        parser.error(f"--restart-minutes is {options.restart_minutes}: it must be 0 or more, and below a million")
    if options.write is not None and options.write.exists():
        raise UserError(f"--write {options.write}: the file exists already; name a new one, or remove it")
    if options.calibrate is not None and options.cluster != parser.get_default("cluster"):
        parser.error(f"--calibrate measures this machine: leave out --cluster {options.cluster}")
    for output in (options.write, options.plot):
        make_folder_of(output)
    if options.plot is not None:
        with needed_by("megatron-tf plan --plot"):
            import_late("matplotlib.figure")
    return _plan(options, overrides)


def _plan(options: Any, overrides: list[str]) -> int:
    import_late("megatron_tf.planning.stages")
    from megatron_tf.config import load_config
    from megatron_tf.planning.cluster import load_cluster
    from megatron_tf.planning.counts import PartCounter
    from megatron_tf.planning.rates import Machine, RatedMachine
    from megatron_tf.planning.report import draw, to_json
    from megatron_tf.planning.stages import rank_stages

    config = load_config(options.config, overrides)
    if options.calibrate is None:
        cluster, counter = load_cluster(options.cluster), PartCounter()
        machine: Machine = RatedMachine(cluster, counter)
    else:
        cluster, counter, machine = _this_machine(options.calibrate)

    def on_stage(number: int, count: int) -> None:
        say(f"stage {number} of {count}: all layouts of {cluster.world_size} ranks")

    track = functools.partial(tracked, "layouts")
    stages = rank_stages(config, cluster, machine=machine, counter=counter, on_stage=on_stage, track=track)
    restart_hours = options.restart_minutes / 60
    if options.json:
        print(json.dumps(to_json(stages, counter, top=options.top, restart_hours=restart_hours), indent=1))
    else:
        print("\n".join(report(stages, counter, top=options.top, restart_hours=restart_hours)))
    if options.plot is not None:
        draw(stages, options.plot, top=options.top)
    if options.write is not None:
        write_run(options.write, stages, config=options.config, overrides=overrides)
    return 0 if all(stage.ranking.fitting for stage in stages) else 1


def _this_machine(ranks: int) -> "tuple[Cluster, PartCounter, Machine]":
    """Return this machine's CPU as a cluster of 1 or 2 ranks that share its memory, and what measures it."""
    from megatron_tf.planning.calibrate import CPU, MeasuredMachine
    from megatron_tf.planning.cluster import PRESETS
    from megatron_tf.planning.counts import PartCounter
    from megatron_tf.planning.network import measure_network

    memory = usable_memory() / _MALLOC_OVERHEAD / ranks / 2**30
    cluster = dataclasses.replace(PRESETS["laptop"], ranks_per_node=ranks, memory_gib=memory)
    say("measuring this machine")
    network = measure_network() if ranks > 1 else None
    return cluster, PartCounter(CPU), MeasuredMachine(network)


def report(stages: "list[StageRanking]", counter: "PartCounter", *, top: int, restart_hours: float) -> list[str]:
    """Return the lines of the tables of all stages."""
    from megatron_tf.planning.report import ranking_lines, stages_lines

    lines = []
    for stage in stages:
        if len(stages) > 1:
            lines += ["", f"stage {stage.number}: {stage.parameters:,} parameters, {len(stage.steps):,} steps"]
        lines += ranking_lines(stage.ranking, counter, top=top)
    return [*lines, *stages_lines(stages, restart_hours=restart_hours)]


def write_run(output: Path, stages: "list[StageRanking]", *, config: Path, overrides: list[str]) -> None:
    """Write the configuration, with the keys of the layout that fits all stages. Raises UserError if none does."""
    from megatron_tf.config.load import load_values
    from megatron_tf.planning.stages import one_layout

    course = one_layout(stages)
    if course is None:
        raise UserError(f"--write {output}: no layout fits all stages: use a larger cluster")
    values = load_values(config, overrides)
    for section, keys in course.plans[0].keys.items():
        values[section] = {**values.get(section, {}), **keys}
    values["parallel"].pop("pipeline_model_parallel_layout", None)
    for stage in values.get("growth", []):
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_model_parallel_layout"):
            stage.pop(key, None)
    ranks = stages[0].ranking.cluster.world_size
    per_node = stages[0].ranking.cluster.ranks_per_node
    start = f"megatron-tf torchrun --nproc-per-node {per_node} -m megatron_tf.pretrain {output}"
    header = f"# {config}, planned for {ranks} rank(s) by megatron-tf plan; start it with\n#   {start}\n"
    output.write_text(header + yaml.safe_dump(values, sort_keys=False))
    say(f"wrote {output}")
