"""Old tokens at a learning rate of their own, as two runs of torch's AdamW; decay by kind of parameter."""

import pytest
import torch

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.config import ConfigError, OptimizerConfig
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.optimizer import MOMENTS, Optimizer
from tests.support.training import STRONG, small_run

NAME, OLD, ROWS = "layers.0.ffn.key_tokens", 4, 7
LR = 1e-2


def declared_parameters(layer):
    """Of an untied model with 12 layers."""
    tokens = {"qkv_tokens": None, "proj_tokens": None} if layer == "transformer" else {}
    keys = {"layer": layer, "num_layers": 12, "untie_embeddings_and_output_weights": True, **tokens}
    return model_parameters(small_run(model=keys).model)


def of_both_layers():
    return {**declared_parameters("tokenformer"), **declared_parameters("transformer")}


def one_process(parameters, shards, config):
    """An optimizer of some tensors of models of both kinds of layers."""
    both = of_both_layers()
    return Optimizer(
        parameters=parameters,
        shards=shards,
        declared={shard.name: both[shard.name] for shard in shards},
        config=config,
        mesh=Mesh(torch.device("cpu")),
    )


def make(start, config, first_row=0):
    """An optimizer of the rows of one tensor from `first_row` on, and the parameter."""
    parameter = torch.nn.Parameter(start[first_row:].clone())
    shard = RowShard(NAME, tuple(start.shape), first_row, len(start), parameter.detach(), True)
    return one_process([parameter], [shard], config), parameter


def old_rows_at(scale):
    """Generations whose old rows have another learning rate."""
    return Generations.of_runs({NAME: [Run(OLD, Generation(lr_scale=scale)), Run(ROWS - OLD, Generation(growth=1))]})


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
    optimizer.generations = old_rows_at(scale)
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
    optimizer.generations = old_rows_at(0.0)
    parameter.grad = torch.ones(ROWS, 3)
    assert optimizer.step(LR).norm == pytest.approx(((ROWS - OLD) * 3) ** 0.5)


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
    second.generations = first.generations
    for gradient in gradients[3:]:
        other.grad = gradient.clone()
        second.step(LR)
    torch.testing.assert_close(other.detach(), adamw(start, gradients, LR), rtol=1e-5, atol=1e-6)


KINDS = {
    "embedding.weight": "embedding",
    "layers.0.attention.query.key_tokens": "qkv",
    "layers.0.attention.key.value_tokens": "qkv",
    "layers.11.attention.value.weight": "qkv",
    "layers.0.attention.proj.key_tokens": "proj",
    "layers.0.ffn.value_tokens": "ffn",
    "layers.0.ffn.up.weight": "ffn",
    "final_norm.bias": "final_norm",
    "head.weight": "head",
}


@pytest.mark.parametrize("layer", ["tokenformer", "transformer"])
def test_every_parameter_has_a_kind(layer):
    assert {parameter.kind for parameter in declared_parameters(layer).values()} == set(KINDS.values())
    both = of_both_layers()
    assert {name: both[name].kind for name in KINDS} == KINDS


@pytest.mark.parametrize(
    ("by_kind", "expected"),
    [
        ({}, dict.fromkeys(KINDS.values(), 0.1) | {"final_norm": 0.0}),
        (
            {"embedding": 0.0, "ffn": 0.5, "final_norm": 0.2},
            {"embedding": 0.0, "qkv": 0.1, "proj": 0.1, "ffn": 0.5, "final_norm": 0.2, "head": 0.1},
        ),
    ],
    ids=["default", "by kind"],
)
def test_each_kind_has_its_decay(by_kind, expected):
    """Without a gradient AdamW leaves a parameter times 1 - lr * decay."""
    parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in KINDS]
    shards = [RowShard(name, (2, 3), 0, 2, p.detach(), True) for name, p in zip(KINDS, parameters, strict=True)]
    config = OptimizerConfig(lr=LR, weight_decay=0.1, weight_decay_by_kind=by_kind)
    optimizer = one_process(parameters, shards, config)
    for parameter in parameters:
        parameter.grad = torch.zeros(2, 3)
    optimizer.step(LR)
    for (name, kind), parameter in zip(KINDS.items(), parameters, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 1 - LR * expected[kind]), msg=name)


def test_norms_have_a_kind_inside_the_layers_and_none_decays():
    parameters = model_parameters(small_run(model=dict(STRONG)).model).values()
    vectors = [parameter for parameter in parameters if len(parameter.shape) == 1]
    assert {parameter.kind for parameter in vectors if parameter.layer is not None} == {"norm"}
    assert {parameter.kind for parameter in vectors if parameter.layer is None} == {"final_norm"}
    assert not any(parameter.decays or parameter.is_sharded for parameter in vectors)
    assert all(parameter.decays and parameter.is_sharded for parameter in parameters if parameter not in vectors)


def test_a_kind_that_is_none_is_explained():
    with pytest.raises(ConfigError, match="'embedding', 'qkv', 'proj', 'ffn', 'norm', 'final_norm' or 'head'"):
        small_run(optimizer={"weight_decay_by_kind": {"norms": 0.0}})
