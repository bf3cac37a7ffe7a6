"""Variants of the run configured by `make_run`, started in the background."""

import sys
import time
from pathlib import Path

import yaml

from tests.support.commands import ENVIRONMENT
from tests.support.processes import PythonProcess

WAIT = 90


def derive_run(folder, name, *, growth=(), **sections):
    """Write NAME.yaml in `folder`: run.yaml with other keys, which saves to NAME and logs to NAME.jsonl."""
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["growth"] = list(growth)
    values["checkpoint"]["save"] = str(folder / name)
    values["logging"]["metrics_file"] = str(folder / f"{name}.jsonl")
    for section, keys in sections.items():
        values[section] |= keys
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start_run(config, ranks=1):
    """Start the run of NAME.yaml, under torchrun if it has several ranks, and return after some steps."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_tf.pretrain", str(config)]
    process = PythonProcess(command, environment=ENVIRONMENT)
    wait_for_steps(config.parent, config.stem, 5, process=process)
    return process


def wait_for_steps(folder, name, count=3, *, seconds=WAIT, process=None, log=None):
    """Wait until NAME.jsonl has that many steps; fail with the contents of `log` if `process` ends."""
    metrics, limit = folder / f"{name}.jsonl", time.monotonic() + seconds
    while not metrics.exists() or metrics.read_text().count('"loss"') < count:
        assert time.monotonic() < limit, log.read_text() if log is not None and log.exists() else "it does not start"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_for_files(*paths):
    """Wait until all of them exist."""
    limit = time.monotonic() + WAIT
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit, "it does not start"
        time.sleep(0.05)


def children_of(pid):
    """Return the child processes of a process; none if it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ranks_of(agent):
    """Return the ranks that torchrun started."""
    return [child for child in children_of(agent) if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes()]
