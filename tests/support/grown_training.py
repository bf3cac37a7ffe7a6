"""A small fp64 run that grows twice, through checkpoints as a run does, on any layout."""

from functools import partial

from megatron_tf.config import RunConfig, parse_config, to_dict
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.records import NO_TOKENIZER
from tests.support.training import random_batch


def growing_run(base: RunConfig, root, stages) -> RunConfig:
    """Configure the run `base` in fp64 with these growth stages, saved under `root`."""
    values = to_dict(base)
    values["training"]["precision"] = "fp64"
    values["checkpoint"]["save"] = str(root)
    return parse_config(RunConfig, values | {"growth": stages}, "test")


def train_and_grow(config: RunConfig, mesh, steps: int):
    """Train `steps` steps at the constant rate optimizer.lr; yield (stage, state, losses) at the start of each stage,
    without losses, and at its end. Collective."""
    build = partial(build_state, mesh=mesh)
    state, record, stage = build(config.at_stage(0)), new_record(config, NO_TOKENIZER), 0
    yield stage, state, []
    losses = []
    for step in range(steps):
        if stage < len(config.growth) and config.growth[stage].at_step == step:
            yield stage, state, losses
            save_state(state, config.at_stage(stage), record, root=config.checkpoint.save)
            run = Resume(config, mesh, tokenizer=NO_TOKENIZER, build=build).restore()
            state, record, stage, losses = run.state, run.record, run.stage, []
            yield stage, state, losses
        losses.append(train_step(state, random_batch(config, step, mesh), config.optimizer.lr).loss)
        record = record.after_step(config.training.global_batch_size, 1, 0.0)
    yield stage, state, losses
