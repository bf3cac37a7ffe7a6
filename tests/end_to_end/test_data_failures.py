"""Whole runs whose data files fail: truncated under a run, and a cache that two runs need at the same time."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from megatron_tf import pretrain
from megatron_tf.checkpoint.commit import newest_checkpoint
from tests.support.commands import ENVIRONMENT, make_run
from tests.support.data import write_data_set
from tests.support.processes import PythonProcess
from tests.support.runs import derive_run, start_run

VOCAB = 257  # of NullTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("failures"))


def losses(folder, name):
    lines = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_data_file_that_is_truncated_ends_the_run_with_its_name_and_the_run_resumes(folder, tmp_path):
    """What the run has saved is not lost: with the whole file again, the same command continues."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(folder / f"data_text_document{suffix}", tmp_path / f"whole{suffix}")
    data = {"data_path": [str(tmp_path / "whole")], "data_cache_path": str(tmp_path / "cache")}
    training = {"train_iters": 100_000, "eval_interval": 0}
    config = derive_run(folder, "truncated", data=data, training=training, checkpoint={"save_interval": 1})
    run = start_run(config)
    content = (tmp_path / "whole.bin").read_bytes()
    os.truncate(tmp_path / "whole.bin", len(content) // 2)
    said, errors = run.communicate(timeout=90)
    assert run.returncode == 1, said
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "whole.bin") in error
    assert f"{len(content):,}" in error
    assert "Traceback" not in errors
    (tmp_path / "whole.bin").write_bytes(content)
    saved = json.loads((newest_checkpoint(folder / "truncated") / "metadata.json").read_text())["training"]["step"]
    assert saved >= 3
    shorter = [f"--training.train_iters={saved + 1}", "--checkpoint.allow_changes=[training.train_iters]"]
    assert pretrain.main([str(config), *shorter]) == 0


def test_two_runs_that_need_the_same_cache_build_it_once_and_train_the_same(folder, tmp_path):
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, VOCAB, 6) for _ in range(200_000)]
    prefix = write_data_set(tmp_path / "many", documents, np.int32)
    cache = tmp_path / "cache"
    data = {"data_path": [str(prefix)], "order": "counter", "split": "1,0,0", "data_cache_path": str(cache)}
    training = {"train_iters": 3, "eval_interval": 0}
    configs = [derive_run(folder, name, data=data, training=training) for name in ("first", "second")]
    command = [sys.executable, "-m", "megatron_tf.pretrain"]
    runs = [PythonProcess([*command, config], environment=ENVIRONMENT) for config in configs]
    for run in runs:
        said, errors = run.communicate(timeout=90)
        assert run.returncode == 0, said + errors
    assert losses(folder, "first") == losses(folder, "second")
    assert len(losses(folder, "first")) == 3
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
