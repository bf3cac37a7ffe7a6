"""The loss over a vocabulary that ranks share, in chunks of tokens, against one process and float64."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.kernels.loss import EagerLoss
from megatron_tf.layers import cross_entropy as cross_entropy_module
from megatron_tf.layers.cross_entropy import IGNORE_INDEX, head_loss
from megatron_tf.parallel.collectives import all_reduce
from tests.support.layouts import layout_config
from tests.support.training import training_run

TOKENS, WIDTH, VOCABULARY = 23, 8, 36
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = (2 * torch.randn(TOKENS, WIDTH, generator=generator)).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::7] = IGNORE_INDEX
    return hidden, weight.double() if dtype == torch.float64 else weight, targets


def shared_loss(mesh, dtype, largest):
    """(loss, loss without gradients, gradient of the hidden states, this rank's rows of the weight's)."""
    hidden, weight, targets = make_inputs(dtype)
    group = mesh.group("tp")
    hidden.requires_grad_()
    weight = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    options = {"divisor": 5.0, "group": group, "kernels": EagerLoss()}
    with patch.object(cross_entropy_module, "_CPU_LOGITS", largest):
        loss = head_loss(hidden, weight, targets, **options)
        loss.backward()
        with torch.no_grad():
            alone = head_loss(hidden, weight, targets, **options)
    return [value.detach().numpy() for value in (loss, alone, all_reduce(hidden.grad, group).double(), weight.grad)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("largest", [1, 60, 1 << 26], ids=["a token a chunk", "chunks", "one chunk"])
def test_ranks_that_share_the_vocabulary_find_the_loss_of_float64(rank_pool, ranks, largest, dtype):
    answers = rank_pool.run(shared_loss, ranks, 1, 1, dtype, largest)
    assert all(answer[0] == answers[0][0] for answer in answers), "ranks disagree on the loss"
    hidden, weight, targets = make_inputs(dtype)
    hidden, weight = (x.to(dtype).double().requires_grad_() for x in (hidden, weight))
    F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE_INDEX, reduction="sum").div(5.0).backward()
    expected = F.cross_entropy((hidden @ weight.t()).detach(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / 5
    found_hidden, found_weight = torch.tensor(answers[0][2]), torch.cat([torch.tensor(a[3]) for a in answers])
    assert abs(answers[0][0] - float(expected)) < TOLERANCE[dtype] * float(expected)
    assert abs(answers[0][1] - answers[0][0]) < 1e-6 * float(expected)
    for found, gradient in ((found_hidden, hidden.grad), (found_weight, weight.grad)):
        assert (found.double() - gradient).norm() < TOLERANCE[dtype] * gradient.norm()


def run_in_chunks(mesh, config, largest):
    with patch.object(cross_entropy_module, "_CPU_LOGITS", largest):
        return training_run(mesh, config, 3)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 2, 2)], ids=str)
def test_a_run_in_chunks_is_the_run_without(rank_pool, layout, precision, tolerance):
    config = layout_config(layout, True, training={"precision": precision})
    (whole, gradients), (chunked, other) = (
        rank_pool.run(run_in_chunks, *layout, config, largest)[-1] for largest in (1 << 26, 500)
    )
    for step, other_step in zip(whole, chunked, strict=True):
        assert step == pytest.approx(other_step, rel=tolerance)
    for name, gradient in gradients.items():
        difference = torch.tensor(gradient - other[name]).norm()
        assert difference < tolerance * torch.tensor(gradient).norm(), name
