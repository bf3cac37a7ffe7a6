"""The model against what the official implementation computed: three normalizations, five optimizer steps."""

import pytest
import torch

from megatron_tf.config import OptimizerConfig
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.optimizer import Optimizer
from tests.support.golden import CASES, fixture_name, golden_model

ONE_PROCESS = Mesh(torch.device("cpu"))


def mean_loss(model, inputs, labels):
    return model(inputs, targets=labels, divisor=labels.numel())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case):
    model, tensors, facts = golden_model(case)
    logits = model(tensors["input_ids"])
    assert (logits.transpose(0, 1) - tensors["logits"]).abs().max() < 2e-5
    loss = mean_loss(model, tensors["input_ids"], tensors["labels"])
    loss.backward()
    assert abs(loss.item() - facts["loss"]) < 1e-6
    for name, parameter in model.named_parameters():
        expected = tensors[f"grad/{fixture_name(model, name)}"]
        error = torch.linalg.vector_norm(parameter.grad - expected) / torch.linalg.vector_norm(expected)
        assert error < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_float64_loss(case):
    model, tensors, facts = golden_model(case, torch.float64)
    loss = mean_loss(model, tensors["input_ids"], tensors["labels"])
    assert abs(loss.item() - facts["loss_fp64"]) < 1e-6  # the official code's rotary tables are fp32


def test_five_adam_steps():
    model, tensors, facts = golden_model("A_adam5")
    config = OptimizerConfig(lr=facts["optimizer"]["lr"])
    optimizer = Optimizer(
        parameters=list(model.parameters()),
        shards=parameter_shards(model, mesh=ONE_PROCESS),
        declared=model_parameters(model.config),
        config=config,
        mesh=ONE_PROCESS,
    )
    inputs, labels = tensors["tokens"][:, :-1], tensors["tokens"][:, 1:]
    for expected_loss, expected_norm in zip(facts["losses_before_each_step"], facts["grad_norms"], strict=True):
        loss = mean_loss(model, inputs, labels)
        loss.backward()
        assert abs(loss.item() - expected_loss) < 1e-5
        assert optimizer.step(config.lr).norm == pytest.approx(expected_norm, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter - tensors[f"after/{fixture_name(model, name)}"]).abs().max() < 1e-5, name
