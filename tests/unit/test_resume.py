"""A resume opens its checkpoint once and builds its model once; the stage of growth is written down."""

import json

import pytest

from megatron_tf import pretrain
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import load_config
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.training.run.resumable import open_resumable
from tests.support.commands import make_run
from tests.support.damage import change_metadata
from tests.support.runs import derive_run

GROWTH = [{"at_step": 2, "ffn_tokens": 128}, {"at_step": 4, "ffn_tokens": 192}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that stopped at step 3, after the first of its two stages of growth."""
    folder = make_run(tmp_path_factory.mktemp("resume"), training={"train_iters": 6}, optimizer={"lr_decay_iters": 6})
    config = derive_run(folder, "saved", growth=GROWTH, checkpoint={"save_interval": 100})
    assert pretrain.main([str(config), "--training.train_iters=3"]) == 0
    return folder


def configured(folder, *overrides, growth=None):
    """The run's configuration, with another list of stages."""
    saved = {"save": str(folder / "saved"), "save_interval": 100}
    other = derive_run(folder, "other", growth=GROWTH if growth is None else growth, checkpoint=saved)
    return load_config(other, overrides)


@pytest.fixture
def counted(monkeypatch):
    """What is opened, and the models that are built, with the number of their FFN tokens."""
    opened, built = [], []
    open_, build = CheckpointReader.__init__, TokenFormer.__init__

    def init(self, path, *arguments, **options):
        opened.append(path.name)
        open_(self, path, *arguments, **options)

    def init_model(self, config, *arguments, **options):
        built.append(config.ffn_tokens)
        build(self, config, *arguments, **options)

    monkeypatch.setattr(CheckpointReader, "__init__", init)
    monkeypatch.setattr(TokenFormer, "__init__", init_model)
    return opened, built


def test_a_resume_opens_the_checkpoint_once_and_builds_the_model_once(folder, counted, tmp_path):
    again = [f"--checkpoint.load={folder / 'saved'}", f"--checkpoint.save={tmp_path}", "--training.train_iters=4"]
    assert pretrain.main([str(folder / "saved.yaml"), *again]) == 0
    assert counted == (["saved"], [128])
    counted[0].clear(), counted[1].clear()
    assert pretrain.main([str(folder / "saved.yaml"), *again[1:], "--training.train_iters=5"]) == 0
    assert counted == (["step_00000004"], [192])


def test_each_growth_within_a_run_opens_one_checkpoint_and_builds_one_model(folder, counted, tmp_path):
    assert pretrain.main([str(folder / "saved.yaml"), f"--checkpoint.save={tmp_path}"]) == 0
    assert counted == (["step_00000002", "step_00000004"], [64, 128, 192])
    stages = {
        path.name: json.loads((path / "metadata.json").read_text())["growth_stage"] for path in tmp_path.glob("step_*")
    }
    assert stages == {"step_00000002": 0, "step_00000004": 1, "step_00000006": 2}


@pytest.mark.parametrize("is_old", [False, True], ids=["recorded", "of an older version"])
def test_the_stage_of_growth_is_known(folder, tmp_path, is_old):
    record = CheckpointReader(folder / "saved").record
    assert (record.growth_stage, record.model.ffn_tokens) == (1, 128)
    source = copied(folder, tmp_path, is_old)
    found = open_resumable(configured(folder), source)
    assert (found.saved_stage, found.stage, found.record.growth_stage) == (1, 1, None if is_old else 1)


def copied(folder, tmp_path, is_old):
    """The checkpoint of step 3, as a version that did not write down the stage would have left it."""
    (directory,) = (folder / "saved").glob("step_00000003")
    copy = tmp_path / directory.name
    copy.mkdir()
    for path in directory.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    if is_old:
        change_metadata(copy, lambda values: values.pop("growth_stage"))
    return copy


@pytest.mark.parametrize("is_old", [False, True], ids=["recorded", "of an older version"])
def test_another_model_is_compared_with_the_stage_that_the_run_had_reached(folder, tmp_path, is_old):
    """Not with the initial model, whose ffn_tokens are 64: to put 128 there would break the run."""
    source = copied(folder, tmp_path, is_old)
    with pytest.raises(CheckpointError) as caught:
        open_resumable(configured(folder, "--model.rotary_base=5000"), source)
    assert (
        "another model: model.rotary_base is 10000.0 in the checkpoint, 5000.0 in the configuration after growth[0]. "
        "Change" in str(caught.value)
    )
    assert "ffn_tokens" not in str(caught.value)


def test_the_stage_of_another_run_is_not_taken_for_one_of_this_run(folder):
    """Its model is this run's first one, or one in the middle of a longer list."""
    alone = open_resumable(configured(folder, "--model.ffn_tokens=128", growth=[]), folder / "saved")
    assert (alone.saved_stage, alone.stage) == (0, 0)
    longer = [{"at_step": 1, "ffn_tokens": 96}, *GROWTH]
    shifted = open_resumable(configured(folder, growth=longer), folder / "saved")
    assert (shifted.saved_stage, shifted.stage) == (2, 2)
