"""The log of a run: a progress bar on a terminal or plain lines in a file, and metrics for the configured sinks."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from megatron_tf.config import LoggingConfig
from megatron_tf.training.observability.row_metrics import RowMetrics
from megatron_tf.training.observability.sinks import BestEffortSink, open_sinks


class MetricsLog:
    """Writes the log and the metrics on one rank; on the others, `enabled` is false and it does nothing.

    Raises OSError if a path can't be written at the start. Later failures only cause a warning.
    """

    def __init__(self, config: LoggingConfig, *, first_step: int, train_iters: int, enabled: bool) -> None:
        self.config = config
        self.enabled = enabled
        self.train_iters = train_iters
        self.sinks: Sequence[BestEffortSink] = open_sinks(config, self._warn, first_step) if enabled else ()
        self.bar = tqdm(
            initial=first_step,
            total=train_iters,
            unit="step",
            disable=not enabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._interval_tokens = 0
        self._is_full = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        for sink in self.sinks:
            sink.close()

    def say(self, text: str) -> None:
        """Write a human-readable line to the log."""
        if not self.enabled:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError as error:
            self._warn(f"the log can't be written: {error}")
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # the reader has exited
        except OSError as error:
            if not self._is_full:
                self._warn(f"the log can't be written: {error}")
            self._is_full = True
        else:
            self._is_full = False

    def event(self, values: Mapping[str, Any]) -> None:
        """Write an event of the run to the sinks."""
        for sink in self.sinks:
            sink.event(values)

    def is_interval(self, step: int) -> bool:
        """Return whether a log line is due after `step` steps."""
        return step % self.config.log_interval == 0 or step == self.train_iters

    def step(
        self, step: int, step_tokens: int, values: Mapping[str, float], *, rows: Sequence[RowMetrics] = ()
    ) -> None:
        """Write the metrics of the step that completed `step` steps."""
        self._interval_tokens += step_tokens
        for sink in self.sinks:
            sink.step(values, rows, step)
        self.bar.update(step - self.bar.n)  # a step that is repeated after a spike goes back
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def interval(self, step: int, values: Mapping[str, float], *, phases: Mapping[str, float], notes: str) -> None:
        """Write the log line of an interval: `values` of its last step, tokens/s, notes, and the share of each phase.

        `phases` holds seconds. The first interval includes the start of the run, which tokens/s excludes.
        """
        seconds = sum(phases.values())
        rate = self._interval_tokens / max(seconds - phases.get("start", 0.0), 1e-9)
        self._interval_tokens = 0
        shown = f"loss {values['loss']:.4f}  grad_norm {values['grad_norm']:.4g}  lr {values['learning_rate']:.4g}"
        shares = [f"{name} {part / seconds:.0%}" for name, part in phases.items() if part >= 0.005 * seconds]
        line = f"step {step:>6}/{self.train_iters}  {shown}  {rate:,.0f} tokens/s  {notes}  ({', '.join(shares)})"
        self.say(line)

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write validation losses after `step` steps: that of the blend under "", those of its datasets by name."""
        by_name = {name: loss for name, loss in losses.items() if name}
        values = {"validation_loss": losses[""]} | {f"validation_loss/{name}": loss for name, loss in by_name.items()}
        for sink in self.sinks:
            sink.scalars(values, step)
        line = f"step {step:>6}/{self.train_iters}  validation loss {losses['']:.4f}"
        if by_name:
            line += f"  ({', '.join(f'{name} {loss:.4f}' for name, loss in by_name.items())})"
        self.say(line)

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nowhere left to report it
            print(f"warning: {text}", file=sys.stderr, flush=True)
