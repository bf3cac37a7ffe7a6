"""The observer of docs/running.md, as a user runs it: it stops two ranks on a plateau, for good, with all saved."""

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from tests.support.commands import make_run, run
from tests.support.docs import python_blocks
from tests.support.paths import ROOT

NO_CHANGE = {"lr": 1e-30, "min_lr": 0.0}  # each evaluation after the first finds the same loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    training = {"train_iters": 100, "eval_interval": 2, "eval_iters": 1}
    folder = make_run(tmp_path_factory.mktemp("plateau"), training=training, optimizer=NO_CHANGE)
    (script,) = python_blocks(ROOT / "docs" / "running.md")
    (folder / "script.py").write_text(script)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plateau_stops_the_run_and_the_same_command_resumes_it(folder, ranks):
    saved = folder / f"saved-{ranks}"
    command = [folder / "script.py", folder / "run.yaml", f"--checkpoint.save={saved}"]
    for job, steps in enumerate((8, 16)):  # one evaluation sets the best loss, three are not better
        done = run(*command, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert f"step {steps:>6}  stopped: no better validation loss in 3 evaluations, saved in {saved}" in done.stdout
        assert ("resuming from" in done.stdout) == (job == 1)
        reader = CheckpointReader(saved)
        reader.verify()
        assert reader.step == steps
        assert not reader.record.details.evaluation_due
