"""Which messages of a Pattention are on their way while products are computed."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.layers.pattention import Pattention, pattend
from megatron_tf.layers.token_chunks import TensorRanks, TokenOrder
from megatron_tf.parallel import collectives
from megatron_tf.training.dry_run.fake_world import DEVICE, fake_rank

EVENTS = {"_allgather_base_": "gather", "_reduce_scatter_base_": "sum", "allreduce_": "sum"}
TOKENS, WIDTH, PARAMETER_TOKENS = 16, 8, 12
WAIT = collectives.Pending.wait


class Events(TorchDispatchMode):
    """Lists matrix products, and activations that are sent, and when a rank waits for them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm_"):
            self.seen.append("product")
        elif name in EVENTS:
            sent = args[0][0] if name == "allreduce_" else args[1]
            self.seen.append(EVENTS[name] if sent.dim() > 1 else "statistic")
        return func(*args, **(kwargs or {}))

    def wait(self, pending):
        if pending._work is not None:  # still on its way
            self.seen.append("wait")
        return WAIT(pending)


def projections_of(count, *, chunks=1, two_passes=False, recompute=False):
    projections = [Pattention(WIDTH, WIDTH, num_tokens=PARAMETER_TOKENS) for _ in range(count)]
    for projection in projections:
        projection.backward_split = "2:2" if two_passes else None
        projection.recompute_scores = recompute
        projection.message_chunks = chunks
    return projections


def events_of_backward(count, x, *, two_passes=False, recompute=False, **options):
    """What happens in the backward of `count` projections on a tensor-parallel rank, in one or two passes."""
    with fake_rank(0, tensor=2, pipeline=1, data=1) as mesh, DEVICE:
        projections = projections_of(count, two_passes=two_passes, recompute=recompute)
        x = torch.empty(x, requires_grad=True)
        y = pattend(x, projections, TensorRanks(mesh.group("tp"), **options))
        parameters = [parameter for projection in projections for parameter in projection.parameters()]
        dy = torch.empty_like(y)
        with Events() as events, patch.object(collectives.Pending, "wait", lambda pending: events.wait(pending)):
            if not two_passes:
                y.backward(dy)
                return events.seen
            torch.autograd.grad(y, x, dy, retain_graph=True)
            first, events.seen = events.seen, []
            torch.autograd.grad(y, parameters, dy)
        return first, events.seen


PART, WHOLE = (TOKENS // 2, WIDTH), (TOKENS, WIDTH)


@pytest.mark.parametrize("count", [1, 3])
def test_a_part_is_gathered_and_its_gradient_summed_during_products(count):
    products = ["product"] * count
    assert events_of_backward(count, PART, gather_dim=-2) == [
        "gather",
        *products,  # the gradient of the weights
        "statistic",
        *products,  # dx
        "sum",
        *products,  # dV
        "wait",  # for x
        *products,  # dK
        "wait",  # for dx
    ]


@pytest.mark.parametrize(("x", "options"), [(WHOLE, {}), (PART, {"gather_dim": -2, "saves_whole": True})], ids=str)
def test_only_the_gradient_of_a_whole_input_is_sent(x, options):
    seen = events_of_backward(1, x, **options)
    assert seen == ["product", "statistic", "product", "sum", "product", "product", "wait"]


def test_recomputed_scores_wait_for_x_first():
    seen = events_of_backward(1, PART, gather_dim=-2, recompute=True)
    assert seen[:3] == ["gather", "wait", "product"]
    assert seen.count("gather") == 1


def test_the_first_of_two_passes_gathers_no_x():
    first, second = events_of_backward(1, PART, gather_dim=-2, two_passes=True)
    assert first == ["product", "statistic", "product", "sum", "wait"]
    assert second == ["product", "gather", "wait", "product"]


@pytest.mark.parametrize("count", [1, 3])
def test_the_activations_of_a_chunk_travel_during_the_products_of_others(count):
    """Only the first chunk that arrives and the last one that leaves are waited for at once."""
    products = ["product"] * count
    with fake_rank(0, tensor=2, pipeline=1, data=1) as mesh, DEVICE:
        ranks = TensorRanks(mesh.group("tp"), gather_dim=-2, scatter_dim=-1)
        x = torch.empty(PART, requires_grad=True)
        with Events() as events, patch.object(collectives.Pending, "wait", lambda pending: events.wait(pending)):
            y = pattend(x, projections_of(count, chunks=3), ranks)
            forward, events.seen = events.seen, []
            y.backward(torch.empty_like(y))
    arrival = [*products, "wait", *products, "wait", *products]
    assert forward == [
        *["gather"] * 3,
        *arrival,  # the scores
        "statistic",
        *[*products, "sum"] * 3,
        *["wait"] * 2,
    ]
    assert events.seen == [
        *["gather"] * 3,  # the gradients of the outputs
        *["gather"] * 3,  # x
        *arrival,  # the gradient of the weights
        "statistic",
        *[*products, "sum"] * 3,  # dx
        *products,  # dV
        *["wait"] * 3,  # for x
        *products,  # dK
        *["wait"] * 3,  # for dx
    ]


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "softmax"])
def test_one_rank_has_no_chunks(norm):
    """Not a bit of the products changes."""
    torch.manual_seed(0)
    pattention, x = Pattention(WIDTH, WIDTH, num_tokens=PARAMETER_TOKENS, norm_activation=norm), torch.randn(WHOLE)
    expected = pattention(x.requires_grad_())
    pattention.message_chunks = 4
    assert torch.equal(pattention(x), expected)
    with Events() as events:
        pattention(x).sum().backward()
    assert events.seen == ["product"] * 6


@pytest.mark.parametrize(("parts", "tokens", "count"), [(1, 1, 4), (1, 7, 3), (2, 8, 3), (4, 5, 5), (3, 2, 9)])
def test_chunks_are_all_tokens_in_order(parts, tokens, count):
    order = TokenOrder(parts, tokens, count)
    chunks = order.chunks()
    assert len(chunks) == min(tokens, count)
    x = torch.arange(parts * tokens).view(1, -1, 1)
    picked = [order.pick(x, chunk).flatten() for chunk in chunks]
    rows = torch.arange(parts * tokens)
    assert torch.equal(torch.cat([rows[chunk.rows] for chunk in chunks]), rows)
    assert [len(each) for each in picked] == [len(rows[chunk.rows]) for chunk in chunks]
    assert max(map(len, picked)) - min(map(len, picked)) <= parts
    whole = torch.cat([each.view(parts, -1) for each in picked], 1)
    assert torch.equal(whole, rows.view(parts, tokens))
