"""The command lines, as a user runs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_tf.config.load import to_dict
from tests.support.training import small_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command, ranks=1, timeout=120, restarts=0):
    """A finished command: `megatron_tf.pretrain ARGS` on ranks, or `tools/NAME.py ARGS`."""
    if command[0].endswith(".py"):
        start = [sys.executable, *command]
    elif ranks == 1:
        start = [sys.executable, "-m", *command]
    else:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        start = [sys.executable, "-m", *launcher, "-m", *command]
    arguments = [str(part) for part in start]
    return subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def make_run(folder, **sections):
    """Data of bytes, and a configuration of a small model, run.yaml, in `folder`; keywords are sections of it."""
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
    data = {"data_path": [f"{prefix}_text_document"], "split": "80,20,0"}
    config = to_dict(small_run(model={"vocab_size": 257}, training=training, data=data, **sections))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def free_port():
    """A port of this host that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
