"""One run at work: the trainer on its configuration, then the evaluation on the held-out text, each a process."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from records import Result, result_of
from runs import Run
from study import Machine

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_TAIL_BYTES = 4096


class Data:
    """The prepared text: what prepare.py writes to data.json in its directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        values = json.loads((directory / "data.json").read_text())
        self.hash: str = values["hash"]
        self.keys: Mapping[str, Any] = values["data"]
        """The `data` section of a configuration, with paths relative to the directory."""

    def section(self) -> dict[str, Any]:
        """Return the `data` section with absolute paths, and the order of samples that the committed results had."""
        home = self.directory.resolve()
        paths = {key: [str(home / name) for name in self.keys[key]] for key in ("data_path", "valid_data_path")}
        tokenizer_model = str(home / self.keys["tokenizer_model"])
        return {"order": "counter", **self.keys, **paths, "tokenizer_model": tokenizer_model}


class Job:
    """The processes of one run, one after the other. `inherited` are file descriptors that they hold open."""

    def __init__(self, run: Run, runs: Path, *, data: Data, machine: Machine, inherited: Sequence[int] = ()) -> None:
        self.run = run
        self.home = runs / run.id
        self.data = data
        self.inherited = tuple(inherited)
        self.started = time.monotonic()
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "heldout.json").unlink(missing_ok=True)  # of an evaluation that was killed
        config = self.home / "run.yaml"
        config.write_text(yaml.safe_dump(trainer_config(run, runs, data=data), sort_keys=False))
        python = [sys.executable, "-m"]
        torchrun = ["megatron_tf.torchrun", "--standalone", f"--nproc-per-node={machine.ranks}", "-m"]
        held_out = data.section()["valid_data_path"]
        places = ["--device", machine.device, "--output", str(self.home / "heldout.json")]
        self._commands = [
            [*python, *(torchrun if machine.ranks > 1 else []), "megatron_tf.pretrain", str(config)],
            [*python, "megatron_tf.evaluate", str(self.checkpoint), "--data-path", *held_out, *places],
        ]
        self.log = self.home / "log"
        self.log.write_text("")
        self.process = self._start()

    @property
    def checkpoint(self) -> Path:
        """The directory of its checkpoints."""
        return self.home / "checkpoint"

    def poll(self) -> int | None:
        """Return the exit code once a process failed or all have succeeded; start the next process when it is due."""
        code = self.process.poll()
        if code == 0 and self._commands:
            self.process = self._start()
            return None
        return code

    def stop(self) -> None:
        """Ask the process to save and exit."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def result(self) -> Result:
        """Return the result of a run whose processes have succeeded."""
        return result_of(self.run, self.home, data=self.data.hash)

    def why(self) -> str:
        """Return the last line of the log."""
        return (self.log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]

    def progress(self) -> float:
        """Return the fraction of the run's own steps that are done."""
        start, end = self.run.steps
        return (last_step(self.home / "metrics.jsonl", start) - start) / (end - start)

    def _start(self) -> subprocess.Popen[bytes]:
        command = self._commands.pop(0)
        source = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C goes to run.py alone, which then stops its runs
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                pass_fds=self.inherited,
            )


def trainer_config(run: Run, runs: Path, *, data: Data) -> dict[str, Any]:
    """Return the configuration of a run with its paths; `runs` holds a directory for each run."""
    home = runs.resolve() / run.id
    config: dict[str, Any] = {key: dict(part) if isinstance(part, dict) else part for key, part in run.config.items()}
    config["data"] = {**config.get("data", {}), **data.section()}
    config["checkpoint"]["save"] = str(home / "checkpoint")
    if run.parent is not None:
        config["checkpoint"]["load"] = str(runs.resolve() / run.parent.id / "checkpoint")
    config["logging"] = {**config.get("logging", {}), "metrics_file": str(home / "metrics.jsonl")}
    return config


def last_step(metrics: Path, default: int) -> int:
    """Return the step of the last complete line of a metrics file."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return default
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return max(default, int(json.loads(line)["step"]))
    return default


def has_checkpoint(runs: Path, run: Run) -> bool:
    """Return whether the checkpoint of a finished run is still there."""
    return (runs / run.id / "checkpoint" / "latest").exists()


def remove(home: Path) -> None:
    """Remove the directory of a run, the checkpoint first, so that a kill leaves none without its metrics."""
    shutil.rmtree(home / "checkpoint", ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its parent ends, even by kill -9."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
