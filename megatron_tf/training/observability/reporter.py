"""Turns what happens in a run into its log and metrics, with rates and how well the machine is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tf.config import RunConfig, to_dict
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.sizes import parameter_count
from megatron_tf.training.observability.metrics import MetricsLog
from megatron_tf.training.observability.observer import Evaluation, Fault, Observer, Stage, StepReport
from megatron_tf.training.observability.step_timer import StepTimer
from megatron_tf.training.observability.throughput import peak_flops, peak_memory


class Reporter(Observer):
    """Tells `log` what a run does; every rank has one, as the most memory of any rank is found together."""

    def __init__(self, log: MetricsLog, *, config: RunConfig, mesh: Mesh, timer: StepTimer) -> None:
        self.log = log
        self.mesh = mesh
        self.timer = timer
        self.world_size = group_size(mesh.world)
        self.peak_flops = peak_flops(config, mesh.device)
        self._communication: float | None = None  # seconds of it in the step under way, if that is profiled

    def on_start(self, stage: Stage, origin: Path | None) -> None:
        """Report the start of a job, from the checkpoint `origin` or from nothing."""
        self._report_stage("start", stage)
        where = f"resuming from {origin} at step {stage.record.training.step}" if origin else "a new run"
        places = " x ".join(f"{axis} {size}" for axis, size in stage.layout.items())
        parameters = parameter_count(stage.config.model)
        self.log.say(f"{parameters:,} parameters on {places} ({self.mesh.device.type}); {where}")

    def on_growth(self, stage: Stage) -> None:
        """See Observer."""
        self._report_stage("growth", stage)
        self._say(stage.record.training.step, f"grown to {parameter_count(stage.config.model):,} parameters")

    def on_profile(self, step: int, communication: float, trace: Path | None) -> None:
        """Report where a trace is; the time of communication goes with the metrics of the step."""
        self._communication = communication
        if trace is not None:
            self._say(step, f"traced: {trace}, and one for each other rank")

    def on_step(self, report: StepReport) -> None:
        """See Observer."""
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
        if not self.log.is_interval(report.step):
            self.log.step(report.step, report.tokens, values)
            return
        memory = peak_memory(self.mesh)
        phases = self.timer.take()
        values["memory_bytes"] = memory
        values |= {f"seconds/{name}": part for name, part in phases.items()}
        self.log.step(report.step, report.tokens, values)
        notes.append(f"{memory / 2**30:.2f} GiB")
        if communication is not None:
            notes.append(f"communicating {communication / report.seconds:.0%} of the step")
        self.log.interval(report.step, values, phases=phases, notes="  ".join(notes))

    def on_fault(self, fault: Fault) -> None:
        """See Observer."""
        self._communication = None  # of a step that was skipped
        self.log.event({"event": fault.kind, "step": fault.step, **fault.values})
        self._say(fault.step, fault.message)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """See Observer."""
        self.log.validation(evaluation.step, {"": evaluation.loss, **evaluation.by_dataset})

    def on_checkpoint(self, path: Path) -> None:
        """See Observer."""
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
