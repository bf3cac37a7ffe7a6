"""Duplication by utility, shrink and perturb within a run on several ranks: the bits of the tool, one error on all."""

import json

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.summary import differences
from megatron_tf.config import ConfigError, GrowthStage, RunConfig, parse_config, to_dict
from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.errors import UserError
from megatron_tf.growth.advice import advise
from megatron_tf.growth.grow import grow
from megatron_tf.growth.utility import measure_utility
from megatron_tf.training.run.checkpointing import save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.run.utility import check_utility_data
from megatron_tf.training.step.state import build_state
from tests.support.grown import trained_checkpoint, write_text
from tests.support.layouts import layout_config
from tests.support.models import VOCAB
from tests.support.toy import target

GROWTH = {
    "init": "duplicate_by_utility",
    "ffn_tokens": 96,
    "qkv_tokens": {"0": 48},
    "shrink_factor": 0.9,
    "perturb_std": 0.01,
}


def run_config(layout, source, **stage):
    values = to_dict(layout_config(layout, model={"vocab_size": VOCAB}, checkpoint={"save": "unused"}))
    values["checkpoint"] |= {"load": str(source), "save": str(source) + "-unused"}
    return parse_config(RunConfig, values | {"growth": [{"at_step": 3, **stage}]}, "test")


def resumed(config, mesh):
    return Resume(
        config, mesh, tokenizer=NullTokenizer().identity, build=lambda staged: build_state(staged, mesh)
    ).restore()


def resume_and_save(mesh, config, root):
    run = resumed(config, mesh)
    save_state(run.state, config.at_stage(run.stage), run.record, root=root)
    return run.advice


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (1, 1, 2)], ids=str)
def test_a_run_grows_to_the_same_bits_as_the_tool(rank_pool, tmp_path, layout):
    source, text = trained_checkpoint(tmp_path / "a"), write_text(tmp_path / "text")
    config = run_config(layout, source, utility_data=str(text), **GROWTH)
    said = rank_pool.run(resume_and_save, *layout, config, tmp_path / "run")
    reader, stage = CheckpointReader(source), GrowthStage(utility_data=str(text), **GROWTH)
    grown = grow(reader, stage, utility=measure_utility(reader, stage))
    reshard(grown, tmp_path / "tool", target(1, 1), check_source=lambda: None)
    one, other = CheckpointReader(tmp_path / "run"), CheckpointReader(tmp_path / "tool")
    assert list(differences(one, other)) == []
    assert one.record.tau == other.record.tau
    assert one.record.generations == other.record.generations
    assert len(one.record.generations.table) > 2  # copies differ in number
    assert said == [tuple(advise(reader.record, grown.record.model))] * len(said)


def failure_of(mesh, config):
    try:
        resumed(config, mesh)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_an_error_of_the_first_rank_is_raised_on_all(rank_pool, tmp_path):
    source, text = trained_checkpoint(tmp_path / "a"), write_text(tmp_path / "text")
    report = {"version": 1, "settings": {}, "inputs": [], "data_sets": [], "tokenizer": {"type": "other"}}
    (tmp_path / "text.json").write_text(json.dumps(report))
    config = run_config((2, 1, 1), source, utility_data=str(text), **GROWTH)
    first, second = rank_pool.run(failure_of, 2, 1, 1, config)
    assert "was made with another tokenizer" in first
    assert first.startswith("DataError")
    assert second == first


def check_of(mesh, config):
    record = CheckpointReader(config.checkpoint.load).record
    try:
        check_utility_data(config, mesh, record=record, first=0)
    except ConfigError as error:
        return str(error)
    return None


def test_missing_data_is_named_before_the_first_step(rank_pool, tmp_path):
    source, text = trained_checkpoint(tmp_path / "a"), write_text(tmp_path / "text")
    fine = run_config((2, 1, 1), source, utility_data=str(text), **GROWTH)
    assert rank_pool.run(check_of, 2, 1, 1, fine) == [None, None]
    wrong = run_config((2, 1, 1), source, utility_data=str(tmp_path / "gone"), **GROWTH)
    first, second = rank_pool.run(check_of, 2, 1, 1, wrong)
    assert first.startswith("growth[0]: utility_data: ")
    assert "gone" in first
    assert second == first


def test_stages_that_are_done_need_no_data(tmp_path, rank_pool):
    source = trained_checkpoint(tmp_path / "a")
    config = run_config((1, 1, 1), source, utility_data=str(tmp_path / "gone"), **GROWTH)
    assert rank_pool.run(check_done, 1, 1, 1, config) == [None]


def check_done(mesh, config):
    check_utility_data(config, mesh, record=CheckpointReader(config.checkpoint.load).record, first=1)
