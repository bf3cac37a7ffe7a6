"""A run falls back to its newest intact checkpoint whatever a stranger or an accident put into the newer one."""

import json

import pytest
import torch

from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import to_dict
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.checkpointing import restore_state
from megatron_tf.training.run.resumable import open_resumable
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from tests.support.damage import FILE, change_manifest, change_metadata, make_fifo
from tests.support.records import NO_TOKENIZER, make_record
from tests.support.training import small_run

ONE_PROCESS = Mesh(torch.device("cpu"))


def build(config):
    return build_state(config, ONE_PROCESS)


def save(root, step):
    """A checkpoint of fresh parameters without moments; returns its directory."""
    config = small_run()
    state = build(config)
    record = make_record(config.model, config=to_dict(config), step=step, samples=56, tokens=896)
    return save_checkpoint(
        root, step, tensors={"model": list(state.shards)}, record=record, writer_label="pp00-tp00-dp00"
    )


DAMAGE = {
    "a FIFO": lambda d: make_fifo(d / FILE),
    "a device": lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").symlink_to("/dev/zero")),
    "an infinite step": lambda d: change_metadata(d, lambda m: m["training"].update(step=float("inf"))),
    "no tau": lambda d: change_metadata(d, lambda m: m.pop("tau")),
    "part of tau": lambda d: change_metadata(d, lambda m: m["tau"].pop("layers.1.ffn")),
    "too many layers": lambda d: change_metadata(d, lambda m: m["model"].update(num_layers=3_000_000)),
    "a lacking tensor": lambda d: change_manifest(d, lambda b: b["groups"]["model"].pop("layers.1.ffn.key_tokens")),
    "a type": lambda d: change_manifest(d, lambda b: b["groups"]["model"]["final_norm.bias"].update(dtype=["F32"])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_run_resumes_from_the_intact_checkpoint_before(tmp_path, damage):
    intact = save(tmp_path, 7)
    damage(save(tmp_path, 9))
    config = small_run(checkpoint={"save": str(tmp_path)})
    resumed = Resume(config, ONE_PROCESS, tokenizer=NO_TOKENIZER, build=build).restore()
    assert resumed.origin == intact
    assert resumed.record.training.step == 7
    assert "step_00000009" in resumed.damaged[0]


def test_a_latest_that_is_a_fifo_is_no_obstacle(tmp_path):
    intact = save(tmp_path, 7)
    make_fifo(tmp_path / "latest")
    config = small_run(checkpoint={"save": str(tmp_path)})
    resumed = Resume(config, ONE_PROCESS, tokenizer=NO_TOKENIZER, build=build).restore()
    assert resumed.origin == intact


def test_keys_of_a_later_writer_are_ignored(tmp_path):
    directory = save(tmp_path, 7)
    change_metadata(directory, lambda m: m["training"].update(epochs=1))
    change_metadata(directory, lambda m: m.update(usage={"flops": 2.0, "watts": 3.0}, future=[1]))
    config = small_run()
    resumable = open_resumable(config, tmp_path)
    record = restore_state(build(config), config=config, tokenizer=NO_TOKENIZER, resumable=resumable)
    assert (record.training.step, record.training.samples, record.usage.flops) == (7, 56, 2.0)
    assert json.loads((directory / "metadata.json").read_text())["training"]["epochs"] == 1
