"""The training loop of one stage of growth: step, tell the observers, evaluate, save."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from megatron_tf.checkpoint.record import RunRecord, TrainingCounters
from megatron_tf.config import RunConfig
from megatron_tf.data.batch import Batch
from megatron_tf.data.blend import Samples
from megatron_tf.data.build import ValidationSet, build_loader
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.parallel.collectives import group_size
from megatron_tf.tokenformer.sizes import training_flops
from megatron_tf.training.observability.observer import Evaluation, StepReport
from megatron_tf.training.run.checkpointing import save_state
from megatron_tf.training.run.context import RunContext
from megatron_tf.training.run.recovery import DivergedError, Recovery
from megatron_tf.training.run.resume import RestoredRun
from megatron_tf.training.step.batch_ids import bad_id_of_batch
from megatron_tf.training.step.schedule import learning_rate, rewarmup
from megatron_tf.training.step.state import TrainState
from megatron_tf.training.step.step import StepResult, evaluation_loss, train_step
from megatron_tf.training.supervision.stop_signal import Stop


class Loop:
    """Steps until the run is done or is to stop, or the next stage of growth is due; in each case all is saved.

    `reload` restores the newest checkpoint into the state.
    """

    def __init__(
        self, config: RunConfig, run: RestoredRun, *, context: RunContext, reload: Callable[[TrainState], RestoredRun]
    ) -> None:
        self.config = config.at_stage(run.stage)
        self.following = config.growth[run.stage : run.stage + 1]
        self.state = run.state
        self.record = run.record
        self.context = context
        self.recovery = Recovery(self.config, run, context=context, reload=reload)
        self.flops_per_token = float(training_flops(self.config.model, config.training.seq_length))
        self.world_size = group_size(self.state.mesh.world)
        self._is_trace_requested = False  # kept for the next step: an evaluation can be between

    @property
    def done(self) -> TrainingCounters:
        """How far the run has come."""
        return self.record.training

    def run(self) -> tuple[RunRecord, Stop | None]:
        """Train; (how far the run has come, why it stops: None where it is done, or the next stage is due)."""
        # a limit of time leaves room for a step, or a run could make none for ever
        stop = self._agree(by_time=False) or self._finish_evaluation()
        is_last = stop is not None
        while self.done.step < self.config.training.train_iters and not is_last:
            result, reason = self._step()
            # once a step on every rank, whatever came of it: a rank alone in a collective would wait for ever
            stop = self._agree(reason)
            if not self._recover(result):
                stop, is_last = self._finish_step(stop)
            elif stop is not None:
                self._save(waits=True)
                is_last = True
        return self.record, stop

    def _agree(self, reason: str | None = None, *, by_time: bool = True) -> Stop | None:
        """Whether and why the ranks stop: `reason` is this rank's observers'."""
        stop, is_trace_requested = self.context.stop_signal.agree(reason, by_time=by_time)
        self._is_trace_requested = self._is_trace_requested or is_trace_requested
        return stop

    def _finish_evaluation(self) -> Stop | None:
        """Make up for an evaluation that the last stop left out; why the run stops in or after it, if it does."""
        if not (self.record.details.evaluation_due and self.context.validation):
            return None
        stop = self._evaluate()
        is_last = stop is not None or self.done.step >= self.config.training.train_iters
        if is_last and not self.record.details.evaluation_due:
            self._save(waits=True)  # or each start of the ended run would evaluate again
        return stop

    def _finish_step(self, stop: Stop | None) -> tuple[Stop | None, bool]:
        """Evaluate and save where it is due; (why the run stops, whether the step was the last of this stage or job).

        `stop` is why it stops already.
        """
        training, step = self.config.training, self.done.step
        save_interval = self.config.checkpoint.save_interval
        is_done = step == training.train_iters
        is_due = any(growth.is_due(step, self.done.tokens) for growth in self.following)
        if self.context.validation and (step % training.eval_interval == 0 or is_done):
            self._set_details(evaluation_due=True)  # noted first: a stop saves in the middle of an evaluation
            stop = stop or self._evaluate()
        is_last = is_done or is_due or stop is not None
        if is_last or (save_interval and step % save_interval == 0):
            self._save(waits=is_last)
            self.recovery.on_saved()
        return stop, is_last

    def _step(self) -> tuple[StepResult, str | None]:
        """Train on the next batch; what came of it, and why observers want to stop."""
        timer, observers = self.context.timer, self.context.observers
        began = time.perf_counter()  # a step includes its wait for data
        number, training = self.done.step + 1, self.config.training
        samples = training.batch_size_at(self.done.samples)
        tokens = samples * training.seq_length
        timer.detail = f"of step {number}"
        timer.enter("data")
        batch = next(self.context.loader)
        timer.enter("forward-backward")
        lr = self._learning_rate(tokens)
        is_trace_requested = self._is_trace_requested
        self._is_trace_requested = False
        with observers.during_step(number, is_trace_requested=is_trace_requested):
            result = train_step(self.state, batch, lr)
        if result.nonfinite:
            # only now: a bad id makes the loss NaN on every rank, and to find it takes a collective
            self._check_ids(self.context.loader.dataset, batch)
        timer.enter("report")
        self._account()
        if result.is_overflow:
            self.record = self.record.after_overflow(samples)
            return result, None
        if result.nonfinite:
            self.record = self.record.after_skip(samples)
            return result, None
        flops = tokens * self.flops_per_token
        self.record = self.record.after_step(samples, tokens, flops)
        report = StepReport(
            loss=result.loss,
            grad_norm=result.grad_norm,
            norms=result.norms,
            learning_rate=lr,
            loss_scale=self.state.scaler.scale if self.state.scaler.is_fp16 else None,
            tokens=tokens,
            flops=flops,
            seconds=time.perf_counter() - began,
            totals=self.done,
            usage=self.record.usage,
        )
        return result, observers.tell(lambda observer: observer.on_step(report))

    def _account(self) -> None:
        """Count the time that devices were held since the last call."""
        usage = self.record.usage
        held = usage.device_seconds + self.context.timer.lap() * self.world_size
        self.record = dataclasses.replace(self.record, usage=dataclasses.replace(usage, device_seconds=held))

    def _set_details(self, **changes: Any) -> None:
        self.record = dataclasses.replace(self.record, details=dataclasses.replace(self.record.details, **changes))

    def _learning_rate(self, step_tokens: int) -> float:
        done = self.done
        lr = learning_rate(
            self.config.optimizer,
            done.step,
            train_iters=self.config.training.train_iters,
            tokens=done.tokens,
            step_tokens=step_tokens,
        )
        growth = self.record.after_growth
        return lr * rewarmup(done.step, growth.step, growth.rewarmup_iters) if growth else lr

    def _recover(self, result: StepResult) -> bool:
        """Undo what is wrong with a step; whether anything was. Raises DivergedError where that does not help."""
        recovered = self.recovery.recover(result, self.record)
        if recovered is None:
            return False
        self.record = recovered.record
        if recovered.failure:
            saved = self._save_before_error("the state before them: the same command resumes after them")
            raise DivergedError(
                f"{recovered.failure} after step {self.done.step}{saved}: lower optimizer.lr, or look at the data"
            )
        return True

    def _check_ids(self, dataset: Samples, batch: Batch) -> None:
        """Save, and raise DataError on every rank, where the batch has an id that the vocabulary has not."""
        bad = bad_id_of_batch(batch, dataset, vocab_size=self.config.model.vocab_size, mesh=self.state.mesh)
        if bad is not None:
            raise DataError(f"{bad}{self._save_before_error(f'the state of step {self.done.step}')}")

    def _save_before_error(self, what: str) -> str:
        """Save, if there is a place to; for the message of the error, where `what` is then."""
        if self.config.checkpoint.save is None:
            return ""
        self._save(waits=True)
        return f"; {self.config.checkpoint.save} holds {what}"

    def _evaluate(self) -> Stop | None:
        """Evaluate on each validation set; why to stop in it, which leaves it due for the next start, or after."""
        mean = 0.0
        by_dataset = {}
        for part in self.context.validation:
            loss = self._loss_on(part)
            if isinstance(loss, Stop):
                return loss
            mean += part.weight * loss
            by_dataset[part.name] = loss
        self._set_details(evaluation_due=False)
        evaluation = Evaluation(self.done.step, mean, by_dataset if len(self.context.validation) > 1 else {})
        return self._agree(self.context.observers.tell(lambda observer: observer.on_evaluation(evaluation)))

    def _loss_on(self, part: ValidationSet) -> float | Stop:
        """Mean loss over the first `eval_iters` global batches, or why the ranks agree to stop on the way."""
        training, total = self.config.training, 0.0
        mesh, masking = self.state.mesh, self.context.loader.masking
        # a loader for each evaluation, so that all of them see the same batches
        with build_loader(part.samples, training=training, mesh=mesh, masking=masking, is_training=False) as loader:
            for _ in range(training.eval_iters):
                self.context.timer.enter("evaluation")
                stop = self._agree()
                if stop is not None:
                    return stop
                batch = next(loader)
                loss = evaluation_loss(self.state, batch)
                if math.isnan(loss):
                    self._check_ids(part.samples, batch)
                total += loss
        return total / training.eval_iters

    def _save(self, waits: bool) -> None:
        root = self.config.checkpoint.save
        if root is None:
            return
        self.context.timer.enter("saving")
        self._account()
        self._set_details(spikes=self.recovery.history())
        save_state(self.state, self.config, self.record, root=root, saver=self.context.saver)
        if waits or not self.config.checkpoint.async_save:
            self.context.saver.wait()
