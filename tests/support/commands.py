"""Runs commands as a user does."""

import json
import os
import socket
import sys

import yaml

from megatron_tf.config.load import to_dict
from tests.support.processes import run_python, run_ranks
from tests.support.training import small_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command, ranks=1, timeout=120, restarts=0):
    """Run `megatron_tf.pretrain ARGS` on ranks, or `tools/NAME.py ARGS`, to its end; under torchrun if it should
    restart ranks."""
    module = [] if str(command[0]).endswith(".py") else ["-m"]
    start = [sys.executable, *module, *map(str, command)]
    if restarts:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        return run_python([start[0], *launcher, *start[1:]], environment=ENVIRONMENT, timeout=timeout)
    if ranks == 1:
        return run_python(start, environment=ENVIRONMENT, timeout=timeout)
    return run_ranks(start, ranks, environment=ENVIRONMENT, port=free_port(), timeout=timeout)


def make_run(folder, **sections):
    """Create a dataset of bytes and run.yaml, a configuration of a small model, in `folder`; keywords are sections."""
    text = "the quick brown fox jumps over the lazy dog. "
    with (folder / "text.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"text": text * (1 + i % 5), "meta": {"pile_set_name": "Fox"}}) + "\n")
        file.write("\n")
    prefix = folder / "data"
    options = ["--tokenizer-type", "NullTokenizer", "--append-eod", "--workers", "2"]
    done = run("tools/preprocess_data.py", "--input", folder / "text.jsonl", "--output-prefix", prefix, *options)
    assert done.returncode == 0, done.stderr
    training = {"train_iters": 4, **sections.pop("training", {})}
    data = {"data_path": [f"{prefix}_text_document"], "split": "80,20,0", "order": None}
    config = to_dict(small_run(model={"vocab_size": 257}, training=training, data=data, **sections))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def free_port():
    """Return a free port of this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
