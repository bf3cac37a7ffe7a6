"""Sinks of metrics: JSON lines, TensorBoard, Weights & Biases. A failing sink never ends a run."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_tf.config import ConfigError, LoggingConfig
from megatron_tf.extras import needed_by
from megatron_tf.training.observability.row_metrics import RowMetrics, as_scalars, as_section


class Sink(Protocol):
    """Receives the metrics and events of a run."""

    name: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write metrics after `step` steps."""

    def step(self, values: Mapping[str, float], rows: Sequence[RowMetrics], step: int) -> None:
        """Write the metrics of the step that completed `step` steps, and those of its `rows`, by default combined."""
        self.scalars({**values, **as_scalars(rows)}, step)

    def event(self, values: Mapping[str, Any]) -> None:
        """Write an event, such as a start, a growth or a skipped batch."""

    def close(self) -> None:
        """Flush and close; nothing is written afterwards."""


class JsonLines(Sink):
    """A file with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)  # unbuffered: no partial line stays in memory when the disk is full

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.event({"step": step, **values})

    def step(self, values: Mapping[str, float], rows: Sequence[RowMetrics], step: int) -> None:
        self.event({"step": step, **values, **({"rows": as_section(rows)} if rows else {})})

    def event(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        start = self.file.tell()
        if self.file.write(line) != len(line):
            self.file.truncate(start)
            raise OSError("the disk is full")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Sink):
    """A TensorBoard directory: scalars by step, and starts and growths as text.

    Steps after `first_step`, written by a job that was killed or before a rewind, are purged.
    """

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        with needed_by("logging.tensorboard_dir"):
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and most runs do not need it

        self.name = str(directory)
        self._open = partial(SummaryWriter, str(directory))
        self.writer = self._open(purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def event(self, values: Mapping[str, Any]) -> None:
        if values["event"] == "rewind":
            self.writer.close()
            self.writer = self._open(purge_step=values["step"] + 1)
        if "parameters" in values:
            text = f"{values['event']}: {values['parameters']:,} parameters; lineage {values['lineage']}"
            self.writer.add_scalar("parameters", values["parameters"], values["step"])
            self.writer.add_text("stages", text, values["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Sink):
    """A run of a Weights & Biases project; a restart with the same name continues the same run.

    Steps that were logged before a kill or a rewind keep their first values, since the service accepts steps only in
    order.
    """

    def __init__(self, project: str, *, name: str | None, directory: Path | None, warn: Callable[[str], None]) -> None:
        with needed_by("logging.wandb_project"):
            wandb = importlib.import_module("wandb")
        self.name = f"Weights & Biases project {project}"
        self.warn = warn
        self.has_repeated = False
        try:
            self.run = wandb.init(project=project, name=name, id=name, resume="allow", dir=directory and str(directory))
        except Exception as error:  # wandb's own errors: no key, no network
            raise ConfigError(f"logging.wandb_project: {' '.join(str(error).split())}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        last = self.run.step
        if step >= last:
            self.run.log(dict(values), step=step)
        elif not self.has_repeated:
            self.warn(
                f"{self.name} is at step {last} already: earlier steps that are repeated keep their first values there"
            )
            self.has_repeated = True

    def event(self, values: Mapping[str, Any]) -> None:
        if "config" in values:
            self.run.config.update(values["config"], allow_val_change=True)
        if "parameters" in values:
            self.scalars({"parameters": values["parameters"]}, values["step"])

    def close(self) -> None:
        self.run.finish()


class BestEffortSink:
    """A sink whose failures do not end a run: `warn` is called when they start, and with their number when they end."""

    def __init__(self, sink: Sink, warn: Callable[[str], None]) -> None:
        self.sink, self.warn = sink, warn
        self.lost = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self.sink.scalars(values, step))

    def step(self, values: Mapping[str, float], rows: Sequence[RowMetrics], step: int) -> None:
        self._try(lambda: self.sink.step(values, rows, step))

    def event(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self.sink.event(values))

    def close(self) -> None:
        self._try(self.sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # any failure of a service or a disk: a month of training is worth more than its log
            self.lost += 1
            if self.lost == 1:
                self.warn(f"{self.sink.name}: {error}; training continues without it until it accepts metrics again")
        else:
            if self.lost:
                self.warn(f"{self.sink.name} accepts metrics again, {self.lost} were lost")
            self.lost = 0


def open_sinks(config: LoggingConfig, warn: Callable[[str], None], first_step: int = 0) -> list[BestEffortSink]:
    """Open the configured sinks of a job that starts after `first_step` steps.

    Raises OSError for a path that can't be written, UserError for a missing package.
    """
    sinks: list[Sink] = []
    if config.metrics_file:
        sinks.append(JsonLines(config.metrics_file))
    if config.tensorboard_dir:
        sinks.append(TensorBoard(config.tensorboard_dir, first_step))
    if config.wandb_project:
        if first_step and config.wandb_exp_name is None:
            warn("logging.wandb_project: without logging.wandb_exp_name this restart is another run there")
        service = WeightsAndBiases(
            config.wandb_project, name=config.wandb_exp_name, directory=config.wandb_save_dir, warn=warn
        )
        sinks.append(service)
    return [BestEffortSink(sink, warn) for sink in sinks]
