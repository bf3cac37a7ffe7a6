"""Growth stages: the layout of each, what they cost, and whether a change of layout pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.config.moment import Moment
from megatron_tf.planning.cluster import Cluster
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.plan import Plan, Ranking, Track, rank_layouts
from megatron_tf.planning.rates import Machine
from megatron_tf.tokenformer.sizes import parameter_count


@dataclass(frozen=True)
class StageRanking:
    """The layouts of one model of a run that grows."""

    number: int
    """Growth stages before it."""
    parameters: int
    steps: range
    """Optimizer steps with this model."""
    ranking: Ranking

    def hours(self, plan: Plan) -> float:
        """Return the device hours of the stage under a layout."""
        return plan.device_hours(len(self.steps))


@dataclass(frozen=True)
class Course:
    """A layout for every stage of a run."""

    plans: Sequence[Plan]
    hours: float
    """Device hours of all stages, and of the restarts."""
    restarts: int
    """How often the layout changes."""


def rank_stages(
    config: RunConfig,
    cluster: Cluster,
    *,
    machine: Machine,
    counter: PartCounter,
    on_stage: Callable[[int, int], None] | None = None,
    track: Track = iter,
) -> list[StageRanking]:
    """Rank the layouts of every model of a run. Raises ConfigError if the steps of a stage are unknown.

    `on_stage` is called with the number of each stage and that of all; `track` is as in `rank_layouts`.
    """
    starts = [0, *(_first_step(config, stage) for stage in config.growth)]
    ends = [*starts[1:], config.training.train_iters]
    found = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if on_stage is not None:
            on_stage(number, len(starts))
        stage = config.at_stage(number)
        ranking = rank_layouts(stage, cluster, machine=machine, counter=counter, track=track)
        found.append(
            StageRanking(
                number=number,
                parameters=parameter_count(stage.model),
                steps=range(start, max(start, end)),
                ranking=ranking,
            )
        )
    return found


def _first_step(config: RunConfig, stage: Moment) -> int:
    if stage.at_step is not None:
        return min(stage.at_step, config.training.train_iters)
    training = config.training
    if stage.at_tokens is None or training.rampup_batch_size or config.data.phases:
        raise ConfigError(
            "growth: a stage is at_tokens, and the tokens of a step change during the run: give at_step to plan it"
        )
    return min(-(-stage.at_tokens // (training.global_batch_size * training.seq_length)), training.train_iters)


def best_course(stages: Sequence[StageRanking], *, restart_hours: float) -> Course | None:
    """Choose a layout for each stage with the fewest device hours in total; None if a stage fits no layout.

    A change of layout costs `restart_hours` on every device. It is found stage by stage: the best course that ends
    with each layout, which either continues with it or changes from the best of all before.
    """
    courses: dict[str, Course] = {}
    for stage in stages:
        if not stage.ranking.fitting:
            return None
        devices = stage.ranking.cluster.world_size
        best = min(courses.values(), key=lambda course: course.hours, default=None)
        following = {}
        for plan in stage.ranking.fitting:
            hours, name = stage.hours(plan), str(plan.keys)
            options = [] if best is None else [_extend(best, plan, hours + restart_hours * devices, restarts=1)]
            if name in courses:
                options.append(_extend(courses[name], plan, hours, restarts=0))
            following[name] = min(options or [Course([plan], hours, 0)], key=lambda course: course.hours)
        courses = following
    return min(courses.values(), key=lambda course: course.hours)


def one_layout(stages: Sequence[StageRanking]) -> Course | None:
    """Choose the one layout that fits all stages with the fewest device hours; None if none fits all."""
    by_name = [{str(plan.keys): plan for plan in stage.ranking.fitting} for stage in stages]
    common = set(by_name[0]).intersection(*by_name[1:])
    courses = []
    for name in sorted(common):
        plans = [plans_of_stage[name] for plans_of_stage in by_name]
        hours = sum(stage.hours(plan) for stage, plan in zip(stages, plans, strict=True))
        courses.append(Course(plans, hours, 0))
    return min(courses, key=lambda course: course.hours, default=None)


def hours_from_scratch(stages: Sequence[StageRanking]) -> float | None:
    """Return the device hours of as many steps with the final model, in its fastest layout; None if none fits."""
    last = stages[-1]
    if not last.ranking.fitting:
        return None
    return last.ranking.fitting[0].device_hours(sum(len(stage.steps) for stage in stages))


def _extend(course: Course, plan: Plan, hours: float, *, restarts: int) -> Course:
    return Course([*course.plans, plan], course.hours + hours, course.restarts + restarts)
