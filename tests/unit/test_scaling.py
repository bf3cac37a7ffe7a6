"""What grows with the number of parameter tokens on several ranks, and what does not, in a step without values."""

from collections import Counter

import pytest

from megatron_tf.training.dry_run.fake_world import fake_rank
from megatron_tf.training.dry_run.observed_step import observe_step
from megatron_tf.training.step.state import build_state
from tests.support.layouts import layout_config


def traffic_of(layout, multiple):
    """(axis, kind) -> (messages, bytes) of a step of the first rank, with `multiple` times the parameter tokens.

    And the parameters of the rank.
    """
    tensor, pipeline, data = layout
    tokens = {"qkv_tokens": 32 * multiple, "proj_tokens": 24 * multiple, "ffn_tokens": 64 * multiple}
    config = layout_config(layout, tensor > 1, untied=True, model=tokens, kernels={"pattention": "eager"})
    with fake_rank(0, tensor=tensor, pipeline=pipeline, data=data) as mesh:
        state = build_state(config, mesh)
        traffic = observe_step(state, config).counter.traffic()
        parameters = sum(parameter.numel() for stage in state.stages for parameter in stage.parameters())
    return {(each.axis, each.kind): (each.calls, each.bytes) for each in traffic}, parameters


@pytest.mark.parametrize("layout", [(2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1)], ids=str)
def test_activations_send_the_same_bytes_when_tokens_grow(layout):
    found = [traffic_of(layout, multiple) for multiple in (1, 2, 4, 8)]
    assert [traffic for traffic, _ in found] == [found[0][0]] * 4
    assert found[3][1] > 4 * found[0][1]


def test_data_parallel_ranks_send_as_many_messages_and_bytes_of_all_parameters():
    for multiple in (1, 2, 4, 8):
        traffic, parameters = traffic_of((1, 1, 2), multiple)
        sizes = Counter({kind: size for (axis, kind), (_, size) in traffic.items() if axis in ("dp", "dp_shard")})
        assert sizes["all-gather"] == sizes["reduce-scatter"] == 4 * parameters
        assert traffic.keys() == traffic_of((1, 1, 2), 1)[0].keys()
