"""What a run says: a progress bar on a terminal or plain lines in a log, JSON lines, TensorBoard."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_tf.config import LoggingConfig


class MetricsLog:
    """Reports from one rank; the others' (`enabled` false) say nothing. Raises OSError for an unwritable file."""

    def __init__(self, config: LoggingConfig, first_step: int, train_iters: int, enabled: bool) -> None:
        self.config = config
        self.enabled = enabled
        self.train_iters = train_iters
        self.file = self._open(config.metrics_file) if enabled and config.metrics_file else None
        self.board = _tensorboard(config.tensorboard_dir) if enabled and config.tensorboard_dir else None
        self.bar = tqdm(
            initial=first_step,
            total=train_iters,
            unit="step",
            disable=not enabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.interval_start, self.interval_tokens = time.perf_counter(), 0

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """A line for people."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def event(self, values: Mapping[str, Any]) -> None:
        """A line for programs."""
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def mark(self, step: int, parameters: int, text: str) -> None:
        """A start or a growth of the model, on TensorBoard."""
        if self.board is not None:
            self.board.add_scalar("parameters", parameters, step)
            self.board.add_text("stages", text, step)

    def step(self, step: int, tokens: int, step_tokens: int, seconds: float, values: Mapping[str, float]) -> None:
        """Metrics of the step that made `step` of them; `tokens` is the run's total."""
        self.interval_tokens += step_tokens
        rate = step_tokens / seconds
        self.event({"step": step, "tokens": tokens, "tokens_per_second": rate, **values})
        self._to_board({**values, "tokens_per_second": rate}, step)
        self.bar.update()
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if step % self.config.log_interval == 0 or step == self.train_iters:
            now = time.perf_counter()
            rate = self.interval_tokens / (now - self.interval_start)
            self.interval_start, self.interval_tokens = now, 0
            shown = "  ".join(
                f"{name} {value:.4g}" if name != "loss" else f"loss {value:.4f}" for name, value in values.items()
            )
            self.say(f"step {step:>6}/{self.train_iters}  {shown}  {rate:,.0f} tokens/s")

    def validation(self, step: int, loss: float) -> None:
        """Loss on the validation split after `step` steps."""
        self.event({"step": step, "validation_loss": loss})
        self._to_board({"validation_loss": loss}, step)
        self.say(f"step {step:>6}/{self.train_iters}  validation loss {loss:.4f}")

    def _to_board(self, values: Mapping[str, float], step: int) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    @staticmethod
    def _open(path: Path) -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")


def _tensorboard(directory: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a second of import that most runs do without

    return SummaryWriter(str(directory))
