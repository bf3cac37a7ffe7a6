"""Parameter tokens are truly sharded, and what a layer communicates is what the design says, whatever N is."""

import pytest
import torch

from megatron_tf.model.parallelize import build_stages
from megatron_tf.parallel import collectives
from tests.support.layouts import layout_config
from tests.support.training import training_run

HIDDEN = 32


def stage_of(mesh, config):
    """This rank's stage for samples of 16 tokens."""
    return build_stages(config.model, config.parallel, mesh, seq_length=16, dtype=torch.float32)[0]


def held_bytes(mesh, config):
    """Bytes of the storage behind this rank's parameter tokens."""
    model = stage_of(mesh, config)
    tokens = [p for name, p in model.named_parameters() if name.endswith("_tokens")]
    return sum(p.detach().untyped_storage().nbytes() for p in tokens)


def test_bytes_of_parameter_tokens_fall_as_one_over_ranks(rank_pool):
    whole = rank_pool.run(held_bytes, 1, 1, 1, layout_config((1, 1, 1)))[0]
    for ranks in (2, 4):
        held = rank_pool.run(held_bytes, ranks, 1, 1, layout_config((ranks, 1, 1)))
        assert held == [whole // ranks] * ranks


def communicated(mesh, config):
    """[(operation, elements sent as the ring algorithm counts them)] of one block, forward and backward."""
    model = stage_of(mesh, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    seen, restore = [], {}
    ranks = mesh.size("tp")
    share = (ranks - 1) / ranks

    def count(owner, name, kind, elements):
        original = restore[owner, name] = getattr(owner, name)

        def counted(*args, **kwargs):
            seen.append((kind, elements(*args)))
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    count(collectives, "_all_gather_single", "all-gather", lambda out, x: out.numel() * share)
    count(collectives, "_reduce_scatter_single", "reduce-scatter", lambda out, x: x.numel() * share)
    count(collectives.dist, "all_reduce", "all-reduce", lambda x: x.numel() * 2 * share)
    try:
        block = model.layers["1"]
        rows = 16 // ranks if config.parallel.sequence_parallel else 16
        x = torch.randn(rows, 1, HIDDEN, requires_grad=True)
        tables = model._rotary(x, None, None)
        y = block(x, tables)
        forward = list(seen)
        seen.clear()
        y.sum().backward()
        return forward, list(seen)
    finally:
        for (owner, name), original in restore.items():
            setattr(owner, name, original)


def by_kind(operations):
    totals = {}
    for kind, elements in operations:
        totals[kind] = totals.get(kind, 0) + elements
    return totals


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_communicates_what_the_table_says(rank_pool, ranks):
    config = layout_config((ranks, 1, 1), sequence_parallel=True)
    answers = rank_pool.run(communicated, ranks, 1, 1, config)
    assert all(answer == answers[0] for answer in answers)
    forward, backward = answers[0]
    unit = 16 * HIDDEN * (ranks - 1) / ranks  # D (R-1)/R for each of 16 tokens
    scalar = 16 * 2 * (ranks - 1) / ranks
    assert [(kind, elements / unit) for kind, elements in forward if kind != "all-reduce"] == [
        ("all-gather", 1),  # sequence, before q, k, v
        ("reduce-scatter", 3),  # q, k, v onto heads
        ("all-gather", 1),  # heads, before proj
        ("reduce-scatter", 1),  # proj onto the sequence
        ("all-gather", 1),  # sequence, before ffn
        ("reduce-scatter", 1),  # ffn onto the sequence
    ]
    assert [elements / scalar for kind, elements in forward if kind == "all-reduce"] == [3, 1, 1]
    assert sorted(e / scalar for kind, e in backward if kind == "all-reduce") == [1, 1, 3]
    moved = by_kind(backward)
    # what was gathered is scattered, what was scattered is gathered, and what the Pattentions read is gathered again
    assert (moved["reduce-scatter"], moved["all-gather"]) == (3 * unit, (5 + 3) * unit)


def saved_shapes(mesh, config):
    """Shapes of the tensors, without parameters, that a block saves for backward."""
    model, ranks = stage_of(mesh, config), mesh.size("tp")
    parameters = {p.data_ptr() for p in model.parameters()}
    shapes = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(16 // ranks, 3, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers["1"](x, model._rotary(x, None, None))
    return shapes


@pytest.mark.parametrize("ranks", [2, 4])
def test_under_sequence_parallelism_a_rank_saves_its_part_of_what_pattentions_read(rank_pool, ranks):
    """Never the whole [S * B, D]: of the inputs of qkv, proj and ffn a rank saves one in R of their elements."""
    config = layout_config((ranks, 1, 1), sequence_parallel=True)
    for shapes in rank_pool.run(saved_shapes, ranks, 1, 1, config):
        assert (16 * 3, HIDDEN) not in shapes
        assert shapes.count((16 * 3 // ranks, HIDDEN)) == 2  # qkv, ffn
        assert shapes.count((16 * 3, HIDDEN // ranks)) == 1  # proj


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_communication_does_not_depend_on_the_number_of_parameter_tokens(rank_pool, sequence_parallel):
    small = rank_pool.run(communicated, 2, 1, 1, layout_config((2, 1, 1), sequence_parallel))
    grown = {"qkv_tokens": 128, "proj_tokens": 96, "ffn_tokens": 256}
    large = rank_pool.run(communicated, 2, 1, 1, layout_config((2, 1, 1), sequence_parallel, model=grown))
    assert small == large


def three_steps(mesh, config):
    """(loss, gradient norm) of each of three steps."""
    return training_run(mesh, config, 3)[0]


@pytest.mark.parametrize("norm", ["gelu_l2_norm", "softmax"])
def test_other_normalizations_under_tensor_parallelism(rank_pool, norm):
    model = {"norm_activation": norm}
    reference = rank_pool.run(three_steps, 1, 1, 1, layout_config((1, 1, 1), model=model))[0]
    curve = rank_pool.run(three_steps, 2, 1, 1, layout_config((2, 1, 1), True, model=model))[0]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(reference), rtol=1e-5, atol=0)
