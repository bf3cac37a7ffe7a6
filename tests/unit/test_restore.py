"""A checkpoint without moments: one that was converted begins with zeros; one of a run lacks something."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.run_state import RunDetails
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import to_dict
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.changes import warn_of_dropout
from megatron_tf.training.run.checkpointing import blend_of, new_record, restore_state, save_state
from megatron_tf.training.run.resumable import open_resumable
from megatron_tf.training.step.state import build_state
from tests.support.records import NO_TOKENIZER, make_record
from tests.support.training import small_run

ONE_PROCESS = Mesh(torch.device("cpu"))


def save(root, config, adam_steps, moments=()):
    """A checkpoint of fresh parameters at step 7, with ones for the moments."""
    state = build_state(config, ONE_PROCESS)
    groups = {"model": list(state.shards)}
    groups |= {m: [shard.with_tensor(torch.ones_like(shard.tensor)) for shard in state.shards] for m in moments}
    counters = {"samples": 56, "tokens": 896, "adam_steps": adam_steps}
    record = make_record(config.model, config=to_dict(config), step=7, **counters)
    save_checkpoint(root, 7, tensors=groups, record=record, writer_label="all")


def restore(root):
    config = small_run()
    state = build_state(config, ONE_PROCESS)
    resumable = open_resumable(config, root)
    return state, restore_state(state, config=config, tokenizer=NO_TOKENIZER, resumable=resumable)


@pytest.mark.parametrize(
    "samples, recorded, blend",
    [(56, "spaced", "spaced"), (56, "greedy", "greedy"), (56, None, "greedy"), (0, None, "spaced")],
    ids=["as named", "greedy", "of version 0.1", "converted"],
)
def test_a_run_keeps_the_blend_of_its_checkpoint(samples, recorded, blend):
    record = make_record(small_run().model, samples=samples)
    assert blend_of(replace(record, details=RunDetails(blend=recorded))) == blend


@pytest.mark.parametrize(
    "saved, now, recorded, named",
    [
        ({"hidden_dropout": 0.1}, {"hidden_dropout": 0.2}, None, "hidden_dropout"),
        ({"attention_dropout": 0.1, "hidden_dropout": 0.1}, {"attention_dropout": 0.1}, "older", "attention_dropout"),
        ({"hidden_dropout": 0.1}, {"hidden_dropout": 0.1}, "splitmix64", None),
        ({"hidden_dropout": 0.1}, {}, None, None),
        ({"hidden_dropout": 0.1}, {"attention_dropout": 0.1}, None, None),
        ({}, {"hidden_dropout": 0.1}, None, None),
    ],
)
def test_a_run_whose_masks_another_generator_drew_says_so(saved, now, recorded, named):
    model = small_run().model
    values = {"model": to_dict(model), "training": {"seq_length": 8, "seed": 7, **saved}}
    record = replace(make_record(model, config=values, samples=56), details=RunDetails(dropout=recorded))
    warning = warn_of_dropout(small_run(training=now), record, Path("saved"))
    if named is None:
        assert warning == ""
    else:
        assert warning.startswith(f"saved was saved by a version that drew the masks of {named} with another generator")


def test_a_converted_checkpoint_begins_with_zero_moments(tmp_path):
    save(tmp_path, small_run(), adam_steps=0)
    state, record = restore(tmp_path)
    assert (record.training.step, state.optimizer.num_steps) == (7, 0)
    assert all(
        not shard.tensor.any() for moment in ("exp_avg", "exp_avg_sq") for shard in state.optimizer.moments(moment)
    )


def test_moments_that_are_there_are_read_even_at_no_step(tmp_path):
    save(tmp_path, small_run(), 0, ("exp_avg", "exp_avg_sq"))
    state, _ = restore(tmp_path)
    assert all(bool((shard.tensor == 1).all()) for shard in state.optimizer.moments("exp_avg"))


@pytest.mark.parametrize("adam_steps, moments, missing", [(7, (), "exp_avg"), (0, ("exp_avg",), "exp_avg_sq")])
def test_a_run_that_lost_its_moments_is_refused(adam_steps, moments, missing, tmp_path):
    save(tmp_path, small_run(), adam_steps, moments)
    with pytest.raises(CheckpointError, match=f"holds no '{missing}'"):
        restore(tmp_path)


def test_a_tau_that_the_record_does_not_have_is_not_saved(tmp_path):
    config = small_run()
    state = build_state(config, ONE_PROCESS)
    record = new_record(config, NO_TOKENIZER)
    save_state(state, config, record, root=tmp_path / "sound")
    state.model.pattentions()["layers.1.ffn"].tau += 1.0
    with pytest.raises(AssertionError, match=r"layers.1.ffn computes with tau"):
        save_state(state, config, record, root=tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
