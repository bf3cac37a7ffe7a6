"""What follows a run: one protocol for its log, its metrics, its profiles, and whatever a user adds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.record import RunRecord, TrainingCounters, Usage
from megatron_tf.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """An optimizer step."""

    loss: float
    """Mean over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    norms: Mapping[str, float]
    """The same by kind of parameter: embedding, qkv, proj, ffn, final_norm, head."""
    learning_rate: float
    loss_scale: float | None
    """Of the next step; None unless training.precision is fp16."""
    tokens: int
    """Of the global batch."""
    flops: float
    """Operations of the model in this step, on all ranks."""
    seconds: float
    """Duration, as this rank measured it."""
    totals: TrainingCounters
    """Steps, samples and tokens of the whole run, over restarts and growth; this step is the last one."""
    usage: Usage
    """Operations and device time of the whole run, as this rank measured them."""

    @property
    def step(self) -> int:
        """Steps of the run so far."""
        return self.totals.step


@dataclass(frozen=True)
class Evaluation:
    """Mean losses on the validation split."""

    step: int
    """Steps of the run so far."""
    loss: float
    """Of all datasets, by weight."""
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    """Of each one, where there are several."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A step that went wrong, or what was done about it: an overflow, a skipped batch, a spike, a rewind."""

    kind: str
    """overflow, skipped, spike or rewind."""
    step: int
    """Steps of the run so far."""
    message: str
    """For people."""
    values: Mapping[str, Any]
    """For programs: `samples`, the position in the data, and what belongs to the kind."""


@dataclass(frozen=True)
class Stage:
    """The run at the start of a job, or after a growth."""

    config: RunConfig
    """Of this stage."""
    record: RunRecord
    layout: Mapping[str, int]
    """Ranks along tp, pp and dp."""


class Observer:
    """Follows a run. To write one, inherit from it and override what is needed: by default each method does nothing.

    Every rank has its own observers and calls them together with the others, in one order and with the same values
    (except where a field says otherwise), so an observer may use collectives. It lives as long as the job: over stages
    of growth, not over a restart. An exception that it raises ends the run.

    `on_step` and `on_evaluation` may return why the run should stop. It then stops on all ranks before its next step,
    with all saved, as after a signal, but for good: with exit code 0. A reason on one rank is enough.
    """

    def during_step(self, step: int, *, is_trace_requested: bool) -> AbstractContextManager[None]:
        """Surround forward, backward and update of step `step`, counted from 1.

        `is_trace_requested` says whether somebody sent SIGUSR2 to any rank since the step before.
        """
        return nullcontext()

    def on_step(self, report: StepReport) -> str | None:
        """Called after each step that updated the parameters, before a spike of its loss is reported."""
        return None

    def on_fault(self, fault: Fault) -> None:
        """Called when a step was skipped, its loss jumped, or the run was rewound."""

    def on_evaluation(self, evaluation: Evaluation) -> str | None:
        """Called after each evaluation that was not interrupted."""
        return None

    def on_checkpoint(self, path: Path) -> None:
        """Called when the checkpoint in `path` is complete. It runs in the thread that writes checkpoints, while
        training continues: without collectives, and the next save waits for it."""

    def on_growth(self, stage: Stage) -> None:
        """Called after a growth within the job, before the first step of the larger model."""


class Observers:
    """The observers of a run, told in their order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    @contextmanager
    def during_step(self, step: int, *, is_trace_requested: bool) -> Iterator[None]:
        """Surround the step with the contexts of all."""
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.during_step(step, is_trace_requested=is_trace_requested))
            yield

    def tell(self, call: Callable[[Observer], str | None]) -> str | None:
        """Let `call` call a method of each; the first reason to stop that one returns."""
        reasons = [call(observer) for observer in self.observers]  # all are told, whatever the first one says
        return next(filter(None, reasons), None)
