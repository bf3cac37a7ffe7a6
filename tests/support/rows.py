"""The small run after two growths, without files: some rows of each kind and a whole layer are new."""

from dataclasses import replace

import torch

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.row_inspector import RowInspector
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.training import random_batch

OLD = Generation(exp_avg_steps=7, exp_avg_sq_steps=7, step_scale=0.5, lr_scale=0.5)
MIDDLE = Generation(growth=1, exp_avg_steps=3, exp_avg_sq_steps=5, rewarmup_iters=4, rewarmup_done=1)
NEW = Generation(growth=2)
NEW_LAYER = 1
LR = 1e-2


def generations_of(model):
    """Old rows, 5 of growth 1 and 7 of growth 2, at places that no split over ranks respects; a new layer."""
    runs = {}
    for name, parameter in model_parameters(model).items():
        rows = parameter.shape[0]
        runs[name] = [Run(rows, OLD)]
        if parameter.layer == NEW_LAYER:
            runs[name] = [Run(rows, NEW)]
        elif parameter.has_units:
            runs[name] = [Run(rows - 12, OLD), Run(5, MIDDLE), Run(7, NEW)]
    return Generations.of_runs(runs)


def grown_state(mesh, config):
    """A state with these generations, of which some tokens never fire, and Adam moments as after some updates."""
    state = build_state(config, mesh)
    state.optimizer.generations = generations_of(config.model)
    declared = model_parameters(config.model)
    with torch.no_grad():
        for shard in state.shards:
            parameter = declared[shard.name]
            for rows, values in ((shard, 1.0), *((each, 0.01) for each in moments_of(state, shard.name))):
                drawn = replace(parameter, name=f"{parameter.name}.{values}").initial_rows(3, rows.start, rows.stop)
                rows.tensor.copy_(drawn.abs() * values if values != 1.0 else 5 * drawn)
            if parameter.writes_output and parameter.layer == 0:  # tokens 2 and 3 are dead
                for row in {2, 3} & set(range(shard.start, shard.stop)):
                    shard.tensor[row - shard.start] *= 1e-3 * (row - 2)
    return state


def moments_of(state, name):
    """The rows of both moments of a parameter that this rank holds."""
    moments = (*state.optimizer.moments("exp_avg"), *state.optimizer.moments("exp_avg_sq"))
    return [each for each in moments if each.name == name]


def inspected_step(mesh, config):
    """What one step measures of its rows."""
    state = grown_state(mesh, config)
    inspector = RowInspector(state.optimizer)
    return train_step(state, random_batch(config, 0, mesh), LR, inspector).rows


def trained(mesh, config, is_inspected, steps=3):
    """The results of some steps, without what is measured of rows, and what this rank holds afterwards."""
    state = grown_state(mesh, config)
    inspector = RowInspector(state.optimizer) if is_inspected else None
    results = [train_step(state, random_batch(config, step, mesh), LR, inspector) for step in range(steps)]
    held = [*state.shards, *state.optimizer.moments("exp_avg"), *state.optimizer.moments("exp_avg_sq")]
    return [replace(result, rows=()) for result in results], [shard.tensor.numpy().copy() for shard in held]
