"""Observers of a run: one interface for its log, metrics, profiles and user-defined callbacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import TrainingCounters, Usage
from megatron_tf.config import RunConfig, TrainingConfig
from megatron_tf.data.phases import Phase, SetState
from megatron_tf.training.observability.row_metrics import RowMetrics


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The measurements of an optimizer step."""

    loss: float
    """Mean over the tokens of the global batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping."""
    norms: Mapping[str, float]
    """The same norm by kind of parameter: embedding, qkv, proj, ffn, norm, final_norm, head."""
    learning_rate: float
    loss_scale: float | None
    """Loss scale of the next step; None unless training.precision is fp16."""
    tokens: int
    """Tokens of the global batch."""
    flops: float
    """Floating-point operations of the model in this step, over all ranks."""
    seconds: float
    """Duration of the step, as measured by this rank."""
    totals: TrainingCounters
    """Steps, samples and tokens of the whole run up to this step, across restarts and growth."""
    usage: Usage
    """Floating-point operations and device time of the whole run, as measured by this rank."""
    rows: Sequence[RowMetrics] = ()
    """Old and new rows by growth, kind and layer, once growth has added rows, at steps that get a log line."""

    @property
    def step(self) -> int:
        """Return the number of steps of the run so far."""
        return self.totals.step


@dataclass(frozen=True)
class Evaluation:
    """Mean losses on the validation split."""

    step: int
    """Steps of the run so far."""
    loss: float
    """Weighted mean over all datasets."""
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    """Mean of each dataset, if there are several."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failed step or the reaction to it: an overflow, a skipped batch, a spike, a rewind."""

    kind: str
    """overflow, skipped, spike or rewind."""
    step: int
    """Steps of the run so far."""
    message: str
    """Human-readable description."""
    values: Mapping[str, Any]
    """Machine-readable details: the samples from `first_sample` to `samples`, the position in the data, are those of
    the failed step, or of the steps that a rewind took back; and values specific to the kind."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What the run has read of its training sets, and left out; only under `data.order: lanes`."""

    reason: Literal["phase", "epoch", "end"]
    """A phase of the data has started, a set has started an epoch, or the run is complete."""
    step: int
    """Steps of the run so far."""
    samples: int
    """Samples that the run has read so far."""
    phase: Phase
    """The phase of the data."""
    training: TrainingConfig
    """The section `training` that is in force, with the sequence length and batch sizes."""
    new_epochs: Sequence[str] = ()
    """The sets that have started an epoch."""

    @property
    def sets(self) -> Mapping[str, SetState]:
        """Return the state of every set that the run has read, by name."""
        return self.phase.states_at(self.samples)


@dataclass(frozen=True)
class Stage:
    """The run at the start of a job, or after a growth."""

    config: RunConfig
    """The configuration of this stage."""
    record: RunRecord
    layout: Mapping[str, int]
    """Ranks along tp, pp and dp, and along cp if there are several."""


class Observer:
    """Base class of callbacks on the events of a run. Override the methods you need; by default they do nothing.

    Every rank has its own observers. All ranks call them at the same time, in the same order and with the same values
    (except where a field says otherwise), so an observer may use collectives. It exists for the whole job: across
    growth stages, but not across restarts. An exception that it raises ends the run.

    `on_step` and `on_evaluation` may return a reason to stop. The run then saves and stops on all ranks before the next
    step, as after a signal, but with exit code 0, so that launchers do not restart it. A reason on one rank is enough.
    """

    def during_step(self, step: int, *, is_trace_requested: bool) -> AbstractContextManager[None]:
        """Return a context manager around forward, backward and update of step `step`, counted from 1.

        `is_trace_requested` says whether any rank received SIGUSR2 since the previous step.
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
        """Called when the checkpoint in `path` is complete.

        It runs in the thread that writes checkpoints, while training continues: it must not use collectives, and the
        next save waits for it.
        """

    def on_data(self, report: DataReport) -> None:
        """Called when a phase of the data starts, when a set starts an epoch, and when the run is complete."""

    def on_growth(self, stage: Stage) -> None:
        """Called after a growth within the job, before the first step of the larger model."""


class Observers:
    """The observers of a run, notified in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    @contextmanager
    def during_step(self, step: int, *, is_trace_requested: bool) -> Iterator[None]:
        """Enter the context managers of all observers around a step."""
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.during_step(step, is_trace_requested=is_trace_requested))
            yield

    def tell(self, call: Callable[[Observer], str | None]) -> str | None:
        """Apply `call` to each observer and return the first reason to stop, if any."""
        reasons = [call(observer) for observer in self.observers]  # a list, so that all are notified
        return next(filter(None, reasons), None)
