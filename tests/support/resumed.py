"""Runs on ranks that are saved, resumed and trained further."""

from functools import partial
from pathlib import Path

from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.records import NO_TOKENIZER
from tests.support.training import random_batch


def fp16_run(mesh, config, steps, root=None):
    """[(loss, gradient norm, scale, whether it overflowed)] from where the checkpoint stands, which is then saved."""
    run = Resume(config, mesh, tokenizer=NO_TOKENIZER, build=lambda staged: build_state(staged, mesh)).restore()
    state, record, seen = run.state, run.record, []
    while record.training.step < steps:
        before = [shard.tensor.clone() for shard in state.shards]
        result = train_step(state, random_batch(config, record.training.step, mesh), 1e-3)
        assert bool(result.nonfinite) == result.is_overflow
        if result.is_overflow:
            assert all((a == shard.tensor).all() for a, shard in zip(before, state.shards, strict=True))
            record = record.after_overflow(8)
        else:
            record = record.after_step(8, 8 * 16, 0.0)
        seen.append((result.loss, result.grad_norm, state.scaler.scale, result.is_overflow))
    if root is not None:
        save_state(state, config, record, root=Path(root))
    assert record.training.adam_steps == state.optimizer.num_steps == steps
    return seen


def train_and_save(mesh, config, root):
    """Train two steps, save, and return (loss, norm) of the third."""
    state, record = build_state(config, mesh), new_record(config, NO_TOKENIZER)
    for step in range(2):
        train_step(state, random_batch(config, step, mesh), config.optimizer.lr)
        record = record.after_step(config.training.global_batch_size, 1, 0.0)
    save_state(state, config, record, root=Path(root))
    return next_step(state, config, mesh)


def resume(mesh, config):
    """Return (loss, norm) of the third step from checkpoint.load."""
    state = Resume(config, mesh, tokenizer=NO_TOKENIZER, build=partial(build_state, mesh=mesh)).restore().state
    return next_step(state, config, mesh)


def next_step(state, config, mesh):
    result = train_step(state, random_batch(config, 2, mesh), config.optimizer.lr)
    return result.loss, result.grad_norm
