"""Moments of a run at which its configuration says that something changes."""

from collections.abc import Iterator, Sequence

from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Count


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Moment:
    """A point of a run, in optimizer steps or in tokens."""

    at_step: Count | None = None
    """Change during the run after this many optimizer steps."""
    at_tokens: Count | None = None
    """Change during the run once this many tokens have been trained on; an alternative to at_step."""

    def is_due(self, step: int, tokens: int) -> bool:
        """Return whether a run has reached this moment after `step` optimizer steps and `tokens` tokens."""
        reached = step if self.at_step is not None else tokens
        return reached >= (self.at_step or self.at_tokens or 0)

    def is_certain_by(self, other: "Moment") -> bool:
        """Return whether a run that has reached `other` has reached this one too; unknown if only one is in tokens."""
        if self.at_step is not None and other.at_step is not None:
            return self.at_step <= other.at_step
        if self.at_tokens is not None and other.at_tokens is not None:
            return self.at_tokens <= other.at_tokens
        return False


def check_moments(key: str, moments: Sequence[Moment]) -> None:
    """Raise ConfigError unless each entry of the list `key` has one moment, and these increase."""
    for number, moment in enumerate(moments):
        if (moment.at_step is None) == (moment.at_tokens is None):
            raise ConfigError(f"{key}[{number}]: give either at_step or at_tokens")
    for unit in ("at_step", "at_tokens"):
        # each unit on its own: only the run itself knows how steps and tokens compare
        times = [time for moment in moments if (time := getattr(moment, unit)) is not None]
        if times != sorted(set(times)):
            raise ConfigError(f"{key}: {unit} must increase from stage to stage, got {times}")


def never_due(key: str, moments: Sequence[Moment], train_iters: int) -> Iterator[str]:
    """Yield a warning for each entry of the list `key` that a run of `train_iters` steps does not reach."""
    for number, moment in enumerate(moments):
        if moment.at_step is not None and moment.at_step >= train_iters:
            yield (
                f"{key}[{number}] never comes due: it is at step {moment.at_step}, and training ends at step "
                f"{train_iters} (training.train_iters)"
            )


def count_due(moments: Sequence[Moment], *, step: int, tokens: int, done: int = 0) -> int:
    """Return how many moments a run has reached, one after another, of which it has passed `done` before."""
    while done < len(moments) and moments[done].is_due(step, tokens):
        done += 1
    return done


def reachable(growth: Sequence[Moment], phases: Sequence[Moment]) -> Iterator[tuple[int, int]]:
    """Yield each (growth stages, phases of the data) that a run can have completed at the same time.

    A moment in steps and one in tokens may come in either order.
    """
    for stage in range(len(growth) + 1):
        for phase in range(len(phases) + 1):
            growth_is_due = any(moment.is_certain_by(past) for moment in growth[stage:][:1] for past in phases[:phase])
            phase_is_due = any(moment.is_certain_by(past) for moment in phases[phase:][:1] for past in growth[:stage])
            if not (growth_is_due or phase_is_due):
                yield stage, phase


def name_of_stage(stage: int, phase: int) -> str:
    """Return the keys of the last changes before a stage of the run that follows at least one, for a message."""
    growth = f"growth[{stage - 1}]"
    if not phase:
        return growth
    return f"data.phases[{phase - 1}]" + (f" after {growth}" if stage else "")
