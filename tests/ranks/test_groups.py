"""Process groups are made once: a state of another size, as after a growth, uses those of the mesh."""

from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

from megatron_tf.parallel.mesh import build_mesh
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.layouts import layout_config
from tests.support.training import random_batch


def groups_made(mesh, configs):
    """By each training of two steps with a new state, after the mesh of the first is built once more."""
    made = []

    def counted(make):
        def count(*arguments, **options):
            made.append(make)
            return make(*arguments, **options)

        return count

    with (
        mock.patch.object(distributed_c10d, "new_group", counted(distributed_c10d.new_group)),
        mock.patch.object(dist, "new_group", counted(dist.new_group)),
        mock.patch.object(device_mesh, "new_group", counted(device_mesh.new_group)),
    ):
        parallel = configs[0].parallel
        build_mesh(
            mesh.device,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            data=mesh.size("dp"),
        )
        counts = [len(made)]
        for config in configs:
            state = build_state(config, mesh)
            for step in range(2):
                train_step(state, random_batch(config, step, mesh), 1e-3)
            counts.append(len(made) - sum(counts))
    return counts


@pytest.mark.parametrize("layout", [(1, 2, 1), (2, 2, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("untied", [False, True])
def test_a_larger_model_makes_none(rank_pool, layout, untied):
    sizes = [{"ffn_tokens": 64}, {"ffn_tokens": 96}, {"ffn_tokens": 128}]
    configs = [layout_config(layout, untied=untied, model=model) for model in sizes]
    for first, *later in rank_pool.run(groups_made, *layout, configs):
        assert first > 0, "what makes groups is counted"
        assert later == [0, 0, 0]
