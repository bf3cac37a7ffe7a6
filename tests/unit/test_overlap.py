"""Which messages of a Pattention's backward are on their way while products are computed."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.layers.pattention import Pattention, pattend
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
        self.seen.append("wait")
        return WAIT(pending)


def events_of_backward(count, x, *, two_passes=False, recompute=False, **options):
    """What happens in the backward of `count` projections on a tensor-parallel rank, in one or two passes."""
    with fake_rank(0, tensor=2, pipeline=1, data=1) as mesh, DEVICE:
        projections = [Pattention(WIDTH, WIDTH, num_tokens=PARAMETER_TOKENS) for _ in range(count)]
        for projection in projections:
            projection.backward_split = "2:2" if two_passes else None
            projection.recompute_scores = recompute
        x = torch.empty(x, requires_grad=True)
        y = pattend(x, projections, mesh.group("tp"), **options)
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
    assert events_of_backward(count, PART, gather_dim=0) == [
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


@pytest.mark.parametrize(("x", "options"), [(WHOLE, {}), (PART, {"gather_dim": 0, "saves_whole": True})], ids=str)
def test_only_the_gradient_of_a_whole_input_is_sent(x, options):
    seen = events_of_backward(1, x, **options)
    assert seen == ["product", "statistic", "product", "sum", "product", "wait", "product", "wait"]


def test_recomputed_scores_wait_for_x_first():
    seen = events_of_backward(1, PART, gather_dim=0, recompute=True)
    assert seen[:3] == ["gather", "wait", "product"]
    assert seen.count("gather") == 1


def test_the_first_of_two_passes_gathers_no_x():
    first, second = events_of_backward(1, PART, gather_dim=0, two_passes=True)
    assert first == ["product", "statistic", "product", "sum", "wait"]
    assert second == ["product", "gather", "wait", "product"]
