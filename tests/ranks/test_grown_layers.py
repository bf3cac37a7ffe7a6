"""Growth by layers and hidden units from and to all eight layouts, in fp64: logits and the next loss stay."""

from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import to_dict
from megatron_tf.inference.model import load_model
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.grown_models import relative_difference
from tests.support.layouts import LAYOUTS, layout_config
from tests.support.records import NO_TOKENIZER
from tests.support.training import random_batch

STEPS = 2
PLAIN = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
MODELS = {
    "l2_norm_gelu": {},
    "gelu_l2_norm untied": {"norm_activation": "gelu_l2_norm", "untie_embeddings_and_output_weights": True},
    "softmax": {"norm_activation": "softmax"},
    "transformer": PLAIN,
    "transformer untied": PLAIN | {"untie_embeddings_and_output_weights": True},
}
GROWTHS = {
    "copies with zeros, and zero keys": (
        "l2_norm_gelu",
        "--num-layers 5 --layer-init copy_zero --grow qkv=48,ffn@0-2=96",
    ),
    "stacked identities, and duplicates": (
        "gelu_l2_norm untied",
        "--num-layers 6 --layer-order stacked --grow qkv=64,proj=48,ffn=140 --growth-init duplicate",
    ),
    "copies in the middle, and duplicates": (
        "softmax",
        "--num-layers 7 --layer-order middle --layer-init copy_zero --grow ffn=128 --growth-init duplicate",
    ),
    "hidden units with zero rows, and copies": ("transformer", "--num-layers 4 --layer-init copy_zero --grow ffn=96"),
    "hidden units with zero columns": ("transformer", "--insert-layers 0,3 --grow ffn=96 --mlp-init zero_value"),
    "copied hidden units": ("transformer untied", "--grow ffn@1=130 --mlp-init duplicate --growth-noise 0.5"),
}


def config_of(layout, model, **sections):
    return layout_config(layout, layout[0] > 1, model=dict(model), training={"precision": "fp64"}, **sections)


def train_and_save(mesh, config, root):
    """Train STEPS steps from scratch, save, and return the loss of the next step."""
    state, record = build_state(config, mesh), new_record(config, NO_TOKENIZER)
    for step in range(STEPS):
        train_step(state, random_batch(config, step, mesh), config.optimizer.lr)
        record = record.after_step(config.training.global_batch_size, 1, 0.0)
    save_state(state, config, record, root=Path(root))
    return train_step(state, random_batch(config, STEPS, mesh), config.optimizer.lr).loss


def next_loss(mesh, config):
    """Return the loss of the next step from checkpoint.load."""
    state = Resume(config, mesh, tokenizer=NO_TOKENIZER, build=partial(build_state, mesh=mesh)).restore().state
    return train_step(state, random_batch(config, STEPS, mesh), config.optimizer.lr).loss


@pytest.fixture(scope="module")
def trained_on(rank_pool, tmp_path_factory):
    """(layout, name of a model) -> a checkpoint of it, and the loss of its next step; each made once."""
    runs = {}

    def run(layout, name):
        if (layout, name) not in runs:
            root = tmp_path_factory.mktemp("trained")
            config = config_of(layout, MODELS[name])
            runs[layout, name] = root, rank_pool.run(train_and_save, *layout, config, root)[0]
        return runs[layout, name]

    return run


# every growth from four layouts and to four; together from and to each layout several times
PAIRS = [
    (name, source, LAYOUTS[place // 2 + 4 * (number % 2)])
    for number, name in enumerate(GROWTHS)
    for place, source in enumerate(LAYOUTS)
    if (place + number) % 2 == 0
]


@pytest.mark.parametrize(("growth", "source", "target"), PAIRS, ids=str)
def test_logits_and_the_next_loss_stay(rank_pool, trained_on, tmp_path, growth, source, target):
    name, options = GROWTHS[growth]
    root, expected = trained_on(source, name)
    layout = [f"--target-tensor-parallel-size={target[0]}", f"--target-pipeline-parallel-size={target[1]}"]
    command = ["--load", str(root), "--save", str(tmp_path), *layout, *options.split(), "--verify"]
    assert reshard_checkpoint.main(command) == 0
    ids = torch.arange(24)[None]
    with torch.no_grad():
        before, after = (load_model(path, dtype=torch.float64)(ids) for path in (root, tmp_path))
    assert relative_difference(before, after) <= 1e-12
    model = to_dict(CheckpointReader(tmp_path).record.model)
    losses = rank_pool.run(next_loss, *target, config_of(target, model, checkpoint={"load": tmp_path}))
    assert losses[0] == pytest.approx(expected, rel=1e-12)
