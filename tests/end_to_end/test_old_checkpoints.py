"""Runs that version 0.1 began are resumed with its losses (tests/data/version_0_1)."""

import json
import shutil

import pytest

from megatron_tf import pretrain
from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.paths import ROOT

RUNS = ROOT / "tests" / "data" / "version_0_1"
CASES = sorted(path.parent.name for path in RUNS.glob("*/run.yaml"))


@pytest.mark.parametrize("case", CASES)
def test_it_is_resumed_with_the_losses_it_had(tmp_path, monkeypatch, case):
    for name in ("data", case):
        shutil.copytree(RUNS / name, tmp_path / name)
    shutil.copy(RUNS / "tokenizer.json", tmp_path)
    monkeypatch.chdir(tmp_path)

    CheckpointReader(tmp_path / case / "saved").verify()
    assert pretrain.main([f"{case}/run.yaml"]) == 0

    lines = map(json.loads, (tmp_path / case / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    before = json.loads((RUNS / case / "losses.json").read_text())
    assert losses == {step: pytest.approx(before[str(step)], rel=1e-5) for step in (4, 5, 6)}
    saved = CheckpointReader(tmp_path / case / "saved")
    assert saved.step == 6
    assert saved.record.details.blend == "greedy"  # for the rest of the run


def test_each_kind_of_run_is_there():
    assert len(CASES) == 6
