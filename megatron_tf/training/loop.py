"""The training loop of one stage of growth: step, report, evaluate, save; skip and rewind where steps go wrong."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.record import RunRecord, TrainingCounters
from megatron_tf.config import RunConfig
from megatron_tf.data.batch import Batch
from megatron_tf.data.blend import Samples
from megatron_tf.data.build import ValidationSet, build_loader
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.loader import BatchLoader
from megatron_tf.tokenformer.sizes import training_flops
from megatron_tf.training.batch_ids import bad_id_of_batch
from megatron_tf.training.checkpointing import save_state
from megatron_tf.training.faults import DivergedError, SpikeDetector, name_unsound
from megatron_tf.training.metrics import MetricsLog
from megatron_tf.training.phases import Phases
from megatron_tf.training.profiling import Profiler
from megatron_tf.training.resume import RestoredRun
from megatron_tf.training.schedule import learning_rate, rewarmup
from megatron_tf.training.state import TrainState
from megatron_tf.training.step import StepResult, evaluation_loss, train_step
from megatron_tf.training.stopping import Stopping
from megatron_tf.training.throughput import peak_flops, peak_memory

_REWINDS_IN_A_ROW = 3


@dataclass
class Tools:
    """What a run works with, whatever its stage of growth."""

    loader: BatchLoader
    validation: Sequence[ValidationSet]
    log: MetricsLog
    saver: BackgroundSaver
    stopping: Stopping
    phases: Phases
    profiler: Profiler
    accounted: float
    """Up to when, by time.monotonic, the time of devices is in the record."""


class Loop:
    """Steps until the run is done or asked to stop, or the next stage of growth is due; in each case all is saved.

    `reload` restores the newest checkpoint into the state.
    """

    def __init__(
        self, config: RunConfig, run: RestoredRun, tools: Tools, reload: Callable[[TrainState], RestoredRun]
    ) -> None:
        self.config = config.at_stage(run.stage)
        self.following = config.growth[run.stage : run.stage + 1]
        self.state, self.record = run.state, run.record
        self.tools, self.reload = tools, reload
        training = config.training
        self.flops_per_token = float(training_flops(self.config.model, training.seq_length))
        self.world_size = self.state.mesh.world.size() if self.state.mesh.world is not None else 1
        self.peak_flops = peak_flops(self.config, self.state.mesh.device)
        self.spikes = SpikeDetector(training.loss_spike_sigmas, run.record.details.spikes)
        self.skipped_in_a_row = self.rewinds_in_a_row = 0

    @property
    def done(self) -> TrainingCounters:
        """How far the run has come."""
        return self.record.training

    def run(self) -> RunRecord:
        """Train; returns the record of how far the run has come."""
        stopping, train_iters = self.tools.stopping, self.config.training.train_iters
        if stopping.agreed(by_time=False):  # a limit of time leaves room for a step, or a run could make none for ever
            return self.record
        is_last = self._finish_evaluation()
        while self.done.step < train_iters and not is_last:
            result = self._step()
            is_stopped = stopping.agreed()
            self.tools.profiler.is_asked = stopping.take_trace_asked()
            if self._set_right(result):
                is_last = is_stopped
                if is_last:
                    self._save(waits=True)
                continue
            is_last = self._finish_step(is_stopped)
        return self.record

    def _finish_evaluation(self) -> bool:
        """Make up for an evaluation that the last stop left out; whether a stop was requested in it."""
        if not (self.record.details.evaluation_due and self.tools.validation):
            return False
        is_stopped = not self._evaluate()
        if not is_stopped and self.done.step >= self.config.training.train_iters:
            self._save(waits=True)  # or each start of the finished run would evaluate again
        return is_stopped

    def _finish_step(self, is_stopped: bool) -> bool:
        """Evaluate and save where it is due; whether the step was the last of this stage or job."""
        training, step = self.config.training, self.done.step
        save_interval = self.config.checkpoint.save_interval
        is_done = step == training.train_iters
        is_due = any(growth.is_due(step, self.done.tokens) for growth in self.following)
        if self.tools.validation and (step % training.eval_interval == 0 or is_done):
            self._set_details(evaluation_due=True)
            is_stopped = is_stopped or not self._evaluate()
        is_last = is_done or is_due or is_stopped
        if is_last or (save_interval and step % save_interval == 0):
            self._save(waits=is_last)
            self.rewinds_in_a_row = 0
        return is_last

    def _step(self) -> StepResult:
        phases, profiler, log = self.tools.phases, self.tools.profiler, self.tools.log
        began = time.perf_counter()
        number, training = self.done.step + 1, self.config.training
        samples = training.batch_size_at(self.done.samples)
        tokens = samples * training.seq_length
        phases.detail = f"of step {number}"
        phases.enter("data")
        batch = next(self.tools.loader)
        phases.enter("forward-backward")
        lr = self._learning_rate(tokens)
        with profiler.step(number):
            result = train_step(self.state, batch, lr)
        if result.unsound:
            self._check_ids(self.tools.loader.dataset, batch)
        phases.enter("report")
        self._account()
        if profiler.written is not None:
            log.say(f"step {number:>6}  traced: {profiler.written}, and one for each other rank")
        if result.is_overflow:
            self.record = self.record.after_overflow(samples)
        elif result.unsound:
            self.record = self.record.after_skip(samples)
        else:
            self.record = self.record.after_step(samples, tokens, tokens * self.flops_per_token)
            self._report(result, tokens, lr, time.perf_counter() - began)
        return result

    def _report(self, result: StepResult, tokens: int, lr: float, seconds: float) -> None:
        log, usage, communication = self.tools.log, self.record.usage, self.tools.profiler.communication
        flops_per_second = tokens * self.flops_per_token / seconds / self.world_size
        values = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "tokens": self.done.tokens,
            "tokens_per_second": tokens / seconds,
            "teraflops_per_device": flops_per_second / 1e12,
            "flops": usage.flops,
            "device_hours": usage.device_seconds / 3600,
            **{f"grad_norm/{kind}": norm for kind, norm in result.norms.items()},
        }
        if self.peak_flops is not None:
            values["mfu"] = flops_per_second / self.peak_flops
        if communication is not None:
            values["seconds/communication"] = communication
        if self.state.scaler.is_fp16:
            values["loss_scale"] = self.state.scaler.scale
        if not log.is_interval(self.done.step):
            log.step(self.done.step, tokens, values)
            return
        memory, phases = peak_memory(self.state.mesh), self.tools.phases.take()
        values |= {"memory_bytes": memory, **{f"seconds/{name}": part for name, part in phases.items()}}
        log.step(self.done.step, tokens, values)
        notes = [f"{flops_per_second / 1e12:.3g} TFLOP/s a device", f"{memory / 2**30:.2f} GiB"]
        if self.peak_flops is not None:
            notes.insert(1, f"MFU {values['mfu']:.1%}")
        if communication is not None:
            notes.append(f"communicating {communication / seconds:.0%} of the step")
        log.interval(self.done.step, values, phases, "  ".join(notes))

    def _account(self) -> None:
        now = time.monotonic()
        usage = self.record.usage
        held = usage.device_seconds + (now - self.tools.accounted) * self.world_size
        self.record = dataclasses.replace(self.record, usage=dataclasses.replace(usage, device_seconds=held))
        self.tools.accounted = now

    def _set_details(self, **changes: Any) -> None:
        self.record = dataclasses.replace(self.record, details=dataclasses.replace(self.record.details, **changes))

    def _learning_rate(self, step_tokens: int) -> float:
        done, iters = self.done, self.config.training.train_iters
        lr = learning_rate(self.config.optimizer, done.step, iters, done.tokens, step_tokens)
        growth = self.record.after_growth
        return lr * rewarmup(done.step, growth.step, growth.rewarmup_iters) if growth else lr

    def _report_overflow(self) -> None:
        log, scale = self.tools.log, self.state.scaler.scale
        step, samples = self.done.step, self.done.samples
        log.event({"event": "overflow", "step": step, "samples": samples, "loss_scale": scale})
        log.say(
            f"step {step:>6}  gradients overflow in fp16, the loss scale is now {scale:g}; the batch that ends at "
            f"sample {samples:,} is skipped"
        )

    def _set_right(self, result: StepResult) -> bool:
        """Report what is wrong with a step, and mend it; whether anything was."""
        if result.is_overflow:
            self._report_overflow()
        elif result.unsound:
            self._skip(result)
        else:
            self.skipped_in_a_row = 0
            return self._has_spiked(result) and self._rewind()
        return True

    def _skip(self, result: StepResult) -> None:
        log = self.tools.log
        self.skipped_in_a_row += 1
        step, samples = self.done.step, self.done.samples
        log.event({"event": "skipped", "step": step, "samples": samples, "unsound": dict(result.unsound)})
        log.say(
            f"step {step:>6}  warning: not finite: {name_unsound(result.unsound)}; the batch that ends at sample "
            f"{samples:,} is skipped, {self.done.skipped} so far"
        )
        if self.skipped_in_a_row == self.config.training.max_skipped_steps:
            self._give_up(f"{self.skipped_in_a_row} batches in a row were not finite in {name_unsound(result.unsound)}")

    def _has_spiked(self, result: StepResult) -> bool:
        """Report a spike; whether it is time to rewind."""
        if not self.spikes.is_spike(result.loss):
            return False
        step, in_a_row = self.done.step, self.spikes.in_a_row
        self.tools.log.event({"event": "spike", "step": step, "loss": result.loss, "samples": self.done.samples})
        self.tools.log.say(
            f"step {step:>6}  warning: the loss jumped to {result.loss:.4f}, {in_a_row} step(s) in a row; the batch "
            f"ends at sample {self.done.samples:,}"
        )
        return in_a_row == self.config.training.rewind_after_spikes

    def _rewind(self) -> bool:
        """Return to the last checkpoint, and continue behind the data read since; whether there is one."""
        spent = self.done
        self.tools.saver.wait()
        restored = self.reload(self.state)
        if restored.origin is None:
            self.tools.log.say(f"step {spent.step:>6}  there is no checkpoint to go back to: going on")
            return False
        self.rewinds_in_a_row += 1
        training = dataclasses.replace(
            restored.record.training,
            samples=spent.samples,
            skipped=spent.skipped + spent.step - restored.record.training.step,
            overflows=spent.overflows,
        )
        self.record = dataclasses.replace(restored.record, training=training, usage=self.record.usage)
        self.spikes.in_a_row = 0
        self.tools.log.event({"event": "rewind", "step": training.step, "samples": spent.samples})
        self.tools.log.say(
            f"step {training.step:>6}  went back to {restored.origin}, and goes on behind sample {spent.samples:,}"
        )
        if self.rewinds_in_a_row == _REWINDS_IN_A_ROW:
            self._give_up(f"the loss jumped again after {_REWINDS_IN_A_ROW} rewinds to the same checkpoint")
        return True

    def _give_up(self, reason: str) -> NoReturn:
        """Save the state, which is the one before what went wrong, and raise DivergedError."""
        saved = ""
        if self.config.checkpoint.save:
            self._save(waits=True)
            saved = f"; {self.config.checkpoint.save} holds the state before them: started again it goes on behind them"
        raise DivergedError(f"{reason} after step {self.done.step}{saved}: lower optimizer.lr, or look at the data")

    def _check_ids(self, dataset: Samples, batch: Batch) -> None:
        """Save, and raise DataError on every rank, where the batch has an id that the vocabulary has not."""
        bad = bad_id_of_batch(batch, dataset, vocab_size=self.config.model.vocab_size, mesh=self.state.mesh)
        if bad is None:
            return
        saved = ""
        if self.config.checkpoint.save:
            self._save(waits=True)
            saved = f"; {self.config.checkpoint.save} holds the state of step {self.done.step}"
        raise DataError(f"{bad}{saved}")

    def _evaluate(self) -> bool:
        """Mean losses over the first `eval_iters` global batches of each validation set; False where a stop was
        requested on the way: the evaluation is then due when the run is started again."""
        training, losses = self.config.training, {"": 0.0}
        mesh, masking = self.state.mesh, self.tools.loader.masking
        for part in self.tools.validation:
            with build_loader(part.samples, training=training, mesh=mesh, masking=masking, is_training=False) as loader:
                total = 0.0
                for _ in range(training.eval_iters):
                    self.tools.phases.enter("evaluation")
                    if self.tools.stopping.agreed():
                        return False
                    batch = next(loader)
                    loss = evaluation_loss(self.state, batch)
                    if math.isnan(loss):
                        self._check_ids(part.samples, batch)
                    total += loss
            losses[""] += part.weight * total / training.eval_iters
            if len(self.tools.validation) > 1:
                losses[part.name] = total / training.eval_iters
        self.tools.log.validation(self.done.step, losses)
        self._set_details(evaluation_due=False)
        return True

    def _save(self, waits: bool) -> None:
        root = self.config.checkpoint.save
        if root is None:
            return
        self.tools.phases.enter("saving")
        self._account()
        self._set_details(spikes=self.spikes.history())
        save_state(self.state, self.config, self.record, root, self.tools.saver)
        if waits or not self.config.checkpoint.async_save:
            self.tools.saver.wait()
