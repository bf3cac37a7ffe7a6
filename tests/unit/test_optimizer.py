"""Old tokens at a learning rate of their own: as two runs of torch's AdamW, and frozen ones untouched."""

import pytest
import torch

from megatron_tf.config import OptimizerConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.training.optimizer import MOMENTS, Optimizer

NAME, OLD, ROWS = "layers.0.ffn.key_tokens", 4, 7
LR = 1e-2


def make(start, config, first_row=0):
    """An optimizer of the rows of one tensor from `first_row` on, and the parameter."""
    parameter = torch.nn.Parameter(start[first_row:].clone())
    shard = RowShard(NAME, tuple(start.shape), first_row, len(start), parameter.detach(), True)
    return Optimizer([parameter], [shard], [NAME], config, Mesh(torch.device("cpu"))), parameter


def adamw(start, gradients, lr):
    """What torch's own AdamW makes of it."""
    p = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([p], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        p.grad = gradient.clone()
        adam.step()
    return p.detach()


@pytest.mark.parametrize("first_row", [0, 2, 4, 5])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_old_rows_have_their_learning_rate(scale, first_row):
    torch.manual_seed(0)
    start, gradients = torch.randn(ROWS, 3), torch.randn(5, ROWS, 3)
    optimizer, parameter = make(start, OptimizerConfig(lr=LR, clip_grad=0), first_row)
    optimizer.scale_old_rows({NAME: OLD}, scale)
    for gradient in gradients:
        parameter.grad = gradient[first_row:].clone()
        optimizer.step(LR)
    expected = torch.cat(
        [adamw(start[:OLD], gradients[:, :OLD], scale * LR), adamw(start[OLD:], gradients[:, OLD:], LR)]
    )
    if scale == 0:
        assert torch.equal(parameter.detach()[: OLD - first_row], start[first_row:OLD]) or first_row >= OLD
        for moment in MOMENTS:
            assert not optimizer.moments(moment)[0].tensor[: max(0, OLD - first_row)].any()
    torch.testing.assert_close(parameter.detach(), expected[first_row:], rtol=1e-5, atol=1e-6)


def test_frozen_rows_do_not_count_in_the_norm():
    start = torch.zeros(ROWS, 3)
    optimizer, parameter = make(start, OptimizerConfig(lr=LR))
    optimizer.scale_old_rows({NAME: OLD}, 0.0)
    parameter.grad = torch.ones(ROWS, 3)
    assert optimizer.step(LR) == pytest.approx(((ROWS - OLD) * 3) ** 0.5)


def test_moments_and_steps_go_on_where_they_were():
    torch.manual_seed(0)
    start, gradients = torch.randn(ROWS, 3), torch.randn(6, ROWS, 3)
    first, parameter = make(start, OptimizerConfig(lr=LR, clip_grad=0))
    for gradient in gradients[:3]:
        parameter.grad = gradient.clone()
        first.step(LR)
    second, other = make(parameter.detach(), OptimizerConfig(lr=LR, clip_grad=0))
    for moment in MOMENTS:
        second.moments(moment)[0].tensor.copy_(first.moments(moment)[0].tensor)
    second.num_steps = first.num_steps
    second.scale_old_rows({NAME: OLD}, 1.0)
    for gradient in gradients[3:]:
        other.grad = gradient.clone()
        second.step(LR)
    torch.testing.assert_close(other.detach(), adamw(start, gradients, LR), rtol=1e-5, atol=1e-6)
