"""Turns the events of a run into log lines and metrics, with throughput, MFU and memory."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tf.config import RunConfig, to_dict
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.sizes import parameter_count
from megatron_tf.training.observability.data_lines import data_event, describe_data
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.observability.observer import DataReport, Evaluation, Fault, Observer, Stage, StepReport
from megatron_tf.training.observability.profiling import StepProfile
from megatron_tf.training.observability.row_metrics import describe
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.observability.stragglers import SlowestRank, StragglerDetector
from megatron_tf.training.observability.throughput import peak_flops, peak_memory, why_no_mfu


class Reporter(Observer):
    """Reports the events of a run to `log`. Every rank has one: memory and times are compared over all ranks."""

    def __init__(self, log: MetricsLog, *, config: RunConfig, mesh: Mesh, timer: StepTimer) -> None:
        self.log = log
        self.mesh = mesh
        self.timer = timer
        self.world_size = group_size(mesh.world)
        self.peak_flops = peak_flops(config, mesh.device)
        self._no_mfu = why_no_mfu(config, mesh.device)
        self.straggler_factor = config.logging.straggler_factor
        self.stragglers = StragglerDetector(mesh)
        self._communication: float | None = None  # seconds in the current step, if profiled
        self._interval_steps = 0

    def on_start(self, stage: Stage, origin: Path | None) -> None:
        """Report the start of a job, from the checkpoint `origin` or from scratch."""
        self._report_stage("start", stage)
        where = f"resuming from {origin} at step {stage.record.training.step}" if origin else "a new run"
        layout = " x ".join(f"{axis} {size}" for axis, size in stage.layout.items())
        parameters = parameter_count(stage.config.model)
        self.log.say(f"{parameters:,} parameters on {layout} ({self.mesh.device.type}); {where}")
        if self._no_mfu:
            self.log.say(self._no_mfu)

    def on_growth(self, stage: Stage) -> None:
        self.stragglers.reset()
        self._report_stage("growth", stage)
        self._say(stage.record.training.step, f"grown to {parameter_count(stage.config.model):,} parameters")

    def on_data(self, report: DataReport) -> None:
        self.log.event(data_event(report))
        self._say(report.step, describe_data(report))

    def on_profile(self, profile: StepProfile) -> None:
        """Report the path of a trace, and keep the communication time for the metrics of the step."""
        self._communication = profile.communication
        self.stragglers.on_profile(profile.seconds, profile.communication)
        if profile.trace is not None:
            self._say(profile.step, f"traced: {profile.trace}, and one for each other rank")

    def on_step(self, report: StepReport) -> None:
        communication = self._communication
        self._communication = None
        flops_per_second = report.flops / report.seconds / self.world_size
        values = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "tokens": report.totals.tokens,
            "tokens_per_second": report.tokens / report.seconds,
            "teraflops_per_device": flops_per_second / 1e12,
            "flops": report.usage.flops,
            "device_hours": report.usage.device_seconds / 3600,
            **{f"grad_norm/{kind}": norm for kind, norm in report.norms.items()},
        }
        notes = [f"{flops_per_second / 1e12:.3g} TFLOP/s a device"]
        if self.peak_flops is not None:
            values["mfu"] = flops_per_second / self.peak_flops
            notes.append(f"MFU {values['mfu']:.1%}")
        if communication is not None:
            values["seconds/communication"] = communication
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        self._interval_steps += 1
        if not self.log.is_interval(report.step):
            self.log.step(report.step, report.tokens, values)
            return
        self._report_interval(report, values=values, notes=notes, communication=communication)

    def _report_interval(
        self, report: StepReport, *, values: dict[str, float], notes: list[str], communication: float | None
    ) -> None:
        """Report what has gathered since the last log line; `values` and `notes` are those of its last step."""
        with self.timer.waiting():
            memory = peak_memory(self.mesh)
        phases = self.timer.take()
        slowest = self._find_slowest(phases)
        values["memory_bytes"] = memory
        values |= {f"seconds/{name}": part for name, part in phases.items()}
        if slowest is not None:
            values["slowdown"] = slowest.slowdown
        self.log.step(report.step, report.tokens, values, rows=report.rows)
        notes.append(f"{memory / 2**30:.2f} GiB")
        if communication is not None:
            notes.append(f"communicating {communication / report.seconds:.0%} of the step")
        self.log.interval(report.step, values, phases=phases, notes="  ".join(notes))
        if slowest is not None and self._is_news(slowest):
            self._report_straggler(report.step, slowest)
        if report.rows:
            self._say(report.step, describe(report.rows))

    def _find_slowest(self, phases: Mapping[str, float]) -> SlowestRank | None:
        """Compare the work of the ranks since the last interval. Collective."""
        waits = self.timer.take_waits()
        work = {name: part - waits[name] for name, part in phases.items()}
        num_steps, self._interval_steps = self._interval_steps, 0
        if self.straggler_factor is None:
            return None
        with self.timer.waiting():
            return self.stragglers.find_slowest(work, num_steps)

    def _is_news(self, slowest: SlowestRank) -> bool:
        """Return whether to warn of a rank; of each measurement of its computation, in profiled steps, only once."""
        is_measured = self.stragglers.has_new_profile or slowest.phase != "computation"
        return is_measured and self.straggler_factor is not None and slowest.slowdown > self.straggler_factor

    def _report_straggler(self, step: int, slowest: SlowestRank) -> None:
        with self.timer.waiting():
            host = self.stragglers.host_of(slowest.rank)
        self.log.event({"event": "straggler", "step": step, "host": host, **asdict(slowest)})
        self._say(
            step,
            f"warning: straggler: rank {slowest.rank} (host {host}) works {slowest.slowdown:.2g} times as long as "
            f"ranks with the same work, which wait for it; most of it in {slowest.phase}: {slowest.seconds:.4f} s a "
            f"step, {slowest.median_seconds:.4f} s on the median rank",
        )

    def on_fault(self, fault: Fault) -> None:
        self._communication = None  # of the skipped step
        self.log.event({"event": fault.kind, "step": fault.step, **fault.values})
        self._say(fault.step, fault.message)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.log.validation(evaluation.step, {"": evaluation.loss, **evaluation.by_dataset})

    def on_checkpoint(self, path: Path) -> None:
        self.log.say(f"saved {path}")

    def _say(self, step: int, text: str) -> None:
        self.log.say(f"step {step:>6}  {text}")

    def _report_stage(self, event: str, stage: Stage) -> None:
        record = stage.record
        values: Mapping[str, Any] = {
            "event": event,
            "step": record.training.step,
            "tokens": record.training.tokens,
            "flops": record.usage.flops,
            "device_hours": record.usage.device_seconds / 3600,
            "parameters": parameter_count(stage.config.model),
            "layout": stage.layout,
            "lineage": [growth.to_json() for growth in record.lineage],
            "config": to_dict(stage.config),
        }
        self.log.event(values)
