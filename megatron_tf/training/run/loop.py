"""The training loop of one stage of growth and phase of the data: step, notify observers, evaluate, save."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import TrainingCounters
from megatron_tf.checkpoint.schedule_start import ScheduleStart
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
from megatron_tf.training.run.left_out import EpochWatch, count_skipped, report_data
from megatron_tf.training.run.recovery import DivergedError, Recovery
from megatron_tf.training.run.resume import RestoredRun
from megatron_tf.training.step.batch_ids import bad_id_of_batch
from megatron_tf.training.step.row_inspector import RowInspector
from megatron_tf.training.step.schedule import learning_rate
from megatron_tf.training.step.state import TrainState
from megatron_tf.training.step.step import StepResult, evaluation_loss, train_step
from megatron_tf.training.supervision.stop_signal import Stop


class Loop:
    """Trains until the run completes, is stopped, or grows or changes its data, and then saves a checkpoint.

    `reload` restores the newest checkpoint into the state.
    """

    def __init__(
        self, config: RunConfig, run: RestoredRun, *, context: RunContext, reload: Callable[[TrainState], RestoredRun]
    ) -> None:
        self.config = run.config_in_force(config)
        self.next_growth = config.growth[run.stage : run.stage + 1]
        self.next_phase = config.data.phases[run.phases : run.phases + 1]
        self.state = run.state
        self.record = run.record
        self.context = context
        self.recovery = Recovery(self.config, run, context=context, reload=reload)
        inspector = RowInspector(self.state.optimizer)
        self.inspector = inspector if inspector.groups.are_new else None
        self.flops_per_token = float(training_flops(self.config.model, self.config.training.seq_length))
        self.epochs = EpochWatch(run.record)
        self.world_size = group_size(self.state.mesh.world)
        self._is_trace_requested = False  # kept for the next step, as an evaluation can come first
        self._has_stepped = False

    @property
    def done(self) -> TrainingCounters:
        """Return the steps, samples and tokens of the run so far."""
        return self.record.training

    def run(self) -> tuple[RunRecord, Stop | None]:
        """Train, and return the record of the run and why it stops.

        The reason is None if the run is complete, or the next growth stage or phase of the data is due.
        """
        self._note_evaluation_after_growth()
        stop = self._agree() or self._finish_evaluation()
        is_last = stop is not None
        while self.done.step < self.config.training.train_iters and not is_last:
            first = self.done.samples
            result, reason = self._step()
            self._has_stepped = True
            # once per step on every rank, whatever the result: a collective on one rank only would hang
            stop = self._agree(reason)
            self._report_epochs()
            if not self._recover(result, first=first):
                stop, is_last = self._finish_step(stop)
            elif stop is not None:
                self._save(waits=True)
                is_last = True
        return self.record, stop

    def _agree(self, reason: str | None = None) -> Stop | None:
        """Agree with the other ranks whether to stop; `reason` is that of this rank's observers."""
        with self.context.timer.waiting():
            # the time limit allows one step, or a run could restart forever without progress
            stop, is_trace_requested = self.context.stop_signal.agree(reason, by_time=self._has_stepped)
        self._is_trace_requested = self._is_trace_requested or is_trace_requested
        return stop

    def _is_evaluation_due(self, *, is_growth_due: bool) -> bool:
        training, step, lineage = self.config.training, self.done.step, self.record.lineage
        if training.eval_after_growth:
            is_after_growth = bool(lineage) and step - lineage[-1].step in training.eval_after_growth
            if is_growth_due or is_after_growth:
                return True
        return step % training.eval_interval == 0

    def _note_evaluation_after_growth(self) -> None:
        """Note the evaluation that is due before the first step of a model that has just grown."""
        lineage = self.record.lineage
        has_just_grown = bool(lineage) and lineage[-1].step == self.done.step
        if has_just_grown and 0 in self.config.training.eval_after_growth:
            self._set_details(evaluation_due=True)

    def _finish_evaluation(self) -> Stop | None:
        """Run an evaluation that the last stop interrupted; return why the run stops in or after it, if it does."""
        if not self.context.validation:
            self._set_details(evaluation_due=False)  # the run was changed not to evaluate
        if not self.record.details.evaluation_due:
            return None
        stop = self._evaluate()
        is_last = stop is not None or self.done.step >= self.config.training.train_iters
        if is_last and not self.record.details.evaluation_due:
            self._save(waits=True)  # or each start of a completed run would evaluate again
        return stop

    def _finish_step(self, stop: Stop | None) -> tuple[Stop | None, bool]:
        """Evaluate and save if due; return why the run stops, and whether this was the last step of the stage or job.

        `stop` is the reason if the ranks have already agreed to stop.
        """
        training, step = self.config.training, self.done.step
        save_interval = self.config.checkpoint.save_interval
        is_done = step == training.train_iters
        is_growth_due, is_phase_due = (
            any(moment.is_due(step, self.done.tokens) for moment in moments)
            for moments in (self.next_growth, self.next_phase)
        )
        if self.context.validation and (is_done or self._is_evaluation_due(is_growth_due=is_growth_due)):
            self._set_details(evaluation_due=True)  # noted first: a stop saves in the middle of an evaluation
            stop = stop or self._evaluate()
        is_last = is_done or is_growth_due or is_phase_due or stop is not None
        if is_last or (save_interval and step % save_interval == 0):
            self._save(waits=is_last)
            self.recovery.on_saved()
        return stop, is_last

    def _step(self) -> tuple[StepResult, str | None]:
        """Train on the next batch; return the result, and why observers want to stop, if they do."""
        timer, observers = self.context.timer, self.context.observers
        start = time.perf_counter()  # a step includes its wait for data
        number, training, first = self.done.step + 1, self.config.training, self.done.samples
        samples = training.batch_size_at(first)
        tokens = samples * training.seq_length
        timer.detail = f"of step {number}"
        timer.enter("data")
        batch = next(self.context.loader)
        timer.enter("forward-backward")
        lr = self._learning_rate(tokens)
        highest_lr = lr * self.state.optimizer.generations.rewarmup
        is_trace_requested = self._is_trace_requested
        self._is_trace_requested = False
        with observers.during_step(number, is_trace_requested=is_trace_requested):
            result = train_step(
                self.state, batch, lr=lr, inspector=self.inspector if self.context.is_logged(number) else None
            )
        if result.nonfinite:
            # only now: a bad id makes the loss NaN on every rank, and finding it takes a collective
            self._check_ids(self.context.loader.dataset, batch)
        timer.enter("report")
        self._account()
        if result.is_overflow or result.nonfinite:
            after = self.record.after_overflow if result.is_overflow else self.record.after_skip
            self.record = count_skipped(after(samples), first)
            return result, None
        flops = tokens * self.flops_per_token
        self.record = self.record.after_step(samples, tokens, flops)
        report = StepReport(
            loss=result.loss,
            grad_norm=result.grad_norm,
            norms=result.norms,
            learning_rate=highest_lr,
            loss_scale=self.state.scaler.scale if self.state.scaler.is_fp16 else None,
            tokens=tokens,
            flops=flops,
            seconds=time.perf_counter() - start,
            totals=self.done,
            usage=self.record.usage,
            rows=result.rows,
        )
        return result, observers.tell(lambda observer: observer.on_step(report))

    def _account(self) -> None:
        """Add the device time since the last call to the usage."""
        usage = self.record.usage
        held = usage.device_seconds + self.context.timer.lap() * self.world_size
        self.record = dataclasses.replace(self.record, usage=dataclasses.replace(usage, device_seconds=held))

    def _set_details(self, **changes: Any) -> None:
        self.record = dataclasses.replace(self.record, details=dataclasses.replace(self.record.details, **changes))

    def _learning_rate(self, step_tokens: int) -> float:
        done, start = self.done, self.record.schedule_start or ScheduleStart()
        return learning_rate(
            self.config.optimizer,
            done.step - start.step,
            train_iters=self.config.training.train_iters - start.step,
            tokens=done.tokens - start.tokens,
            step_tokens=step_tokens,
        )

    def _report_epochs(self) -> None:
        if started := self.epochs.started(self.done.samples):
            training = self.config.training
            report_data(self.context.observers, self.record, training, reason="epoch", new_epochs=started)

    def _recover(self, result: StepResult, *, first: int) -> bool:
        """Recover from a failed step; return whether it failed. Raises DivergedError if recovery is exhausted."""
        recovered = self.recovery.recover(result, self.record, first=first)
        if recovered is None:
            return False
        self.record = recovered.record
        if recovered.failure:
            saved = self._save_before_error("the state before them: the same command resumes after them")
            keys = "optimizer.lr or loss_scale" if self.state.scaler.is_fp16 else "optimizer.lr"
            raise DivergedError(
                f"{recovered.failure} after step {self.done.step}{saved}: lower {keys}, or look at the data"
            )
        return True

    def _check_ids(self, dataset: Samples, batch: Batch) -> None:
        """Raise DataError on every rank, after a save, if the batch has an id outside the vocabulary. Collective."""
        bad = bad_id_of_batch(batch, dataset, vocab_size=self.config.model.vocab_size, mesh=self.state.mesh)
        if bad is not None:
            raise DataError(f"{bad}{self._save_before_error(f'the state of step {self.done.step}')}")

    def _save_before_error(self, what: str) -> str:
        """Save if `checkpoint.save` is set; return the part of the error message that says where `what` is stored."""
        if self.config.checkpoint.save is None:
            return ""
        self._save(waits=True)
        return f"; {self.config.checkpoint.save} holds {what}"

    def _evaluate(self) -> Stop | None:
        """Evaluate on each validation set; return why to stop, if so. A stop during evaluation leaves it due."""
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
        """Return the mean loss over the first `eval_iters` global batches, or the stop that interrupts it."""
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
