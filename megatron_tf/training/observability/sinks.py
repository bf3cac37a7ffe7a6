"""Where metrics go: JSON lines, TensorBoard, Weights & Biases. None of them can end a run."""

import importlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_tf.config import ConfigError, LoggingConfig
from megatron_tf.extras import needed_by


class Sink(Protocol):
    """Takes what a run measures."""

    name: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Metrics after `step` steps."""

    def event(self, values: Mapping[str, Any]) -> None:
        """Something that happened: a start, a growth, a skipped batch."""

    def close(self) -> None:
        """Finish what was taken: nothing is written after this."""


class JsonLines:
    """One object a line."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)  # no half line waits in memory for a disk that is full

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Sink."""
        self.event({"step": step, **values})

    def event(self, values: Mapping[str, Any]) -> None:
        """See Sink."""
        line = json.dumps(values).encode() + b"\n"
        start = self.file.tell()
        if self.file.write(line) != len(line):
            self.file.truncate(start)
            raise OSError("the disk is full")

    def close(self) -> None:
        """See Sink."""
        self.file.close()


class TensorBoard:
    """Scalars by step; starts and growths as text, with the number of parameters as a scalar.

    What was written of steps after `first_step`, by a job that was killed or before a rewind, is no longer shown.
    """

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        with needed_by("logging.tensorboard_dir"):
            from torch.utils.tensorboard import SummaryWriter  # a second of import that most runs do without

        self.name = str(directory)
        self._open = partial(SummaryWriter, str(directory))
        self.writer = self._open(purge_step=first_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Sink."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def event(self, values: Mapping[str, Any]) -> None:
        """See Sink."""
        if values["event"] == "rewind":
            self.writer.close()
            self.writer = self._open(purge_step=values["step"] + 1)
        if "parameters" in values:
            text = f"{values['event']}: {values['parameters']:,} parameters; lineage {values['lineage']}"
            self.writer.add_scalar("parameters", values["parameters"], values["step"])
            self.writer.add_text("stages", text, values["step"])

    def close(self) -> None:
        """See Sink."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project; of the same name, it is the same run after a restart.

    A step that is there already, from before a kill or a rewind, keeps its first values: the service takes steps in
    order only.
    """

    def __init__(self, project: str, *, name: str | None, directory: Path | None, warn: Callable[[str], None]) -> None:
        with needed_by("logging.wandb_project"):
            wandb = importlib.import_module("wandb")
        self.name = f"Weights & Biases project {project}"
        self.warn = warn
        self.has_repeated = False
        try:
            self.run = wandb.init(project=project, name=name, id=name, resume="allow", dir=directory and str(directory))
        except Exception as error:  # its own kinds: no key, no network
            raise ConfigError(f"logging.wandb_project: {' '.join(str(error).split())}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Sink."""
        last = self.run.step
        if step >= last:
            self.run.log(dict(values), step=step)
        elif not self.has_repeated:
            self.warn(
                f"{self.name} is at step {last} already: earlier steps that are repeated keep their first values there"
            )
            self.has_repeated = True

    def event(self, values: Mapping[str, Any]) -> None:
        """See Sink."""
        if "config" in values:
            self.run.config.update(values["config"], allow_val_change=True)
        if "parameters" in values:
            self.scalars({"parameters": values["parameters"]}, values["step"])

    def close(self) -> None:
        """See Sink."""
        self.run.finish()


class BestEffortSink:
    """A sink that can't end a run: `warn` is told when its failures begin and end, and how many there were."""

    def __init__(self, sink: Sink, warn: Callable[[str], None]) -> None:
        self.sink, self.warn = sink, warn
        self.lost = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Sink."""
        self._try(lambda: self.sink.scalars(values, step))

    def event(self, values: Mapping[str, Any]) -> None:
        """See Sink."""
        self._try(lambda: self.sink.event(values))

    def close(self) -> None:
        """See Sink."""
        self._try(self.sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service or a disk has: a month of training is worth more than its log
            self.lost += 1
            if self.lost == 1:
                self.warn(f"{self.sink.name}: {error}; training continues without it until it takes metrics again")
        else:
            if self.lost:
                self.warn(f"{self.sink.name} takes metrics again, {self.lost} were lost")
            self.lost = 0


def open_sinks(config: LoggingConfig, warn: Callable[[str], None], first_step: int = 0) -> list[BestEffortSink]:
    """The configured sinks of a job that starts after `first_step` steps.

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
