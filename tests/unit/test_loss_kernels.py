"""Which kernels compute the loss, and that they are built, or replaced, before the first step."""

import pytest
import torch

from megatron_tf.config import parse_config
from megatron_tf.config.model import ModelConfig
from megatron_tf.kernels.dispatch import choose_kernels, without_pattention_kernels
from megatron_tf.kernels.loss import EagerLoss
from megatron_tf.model.parallelize import choose_computation, warm_up_kernels
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh

REQUESTED = {"pattention": "auto", "attention": "sdpa", "norm": "torch", "optimizer": "torch"}
CPU = torch.device("cpu")


class BrokenLoss(EagerLoss):
    """As kernels are on a machine without a C compiler."""

    name = "triton"

    def statistics(self, logits, targets):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def test_a_gpu_computes_the_loss_with_triton_unless_pattention_can_not(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen = choose_kernels(REQUESTED, torch.device("cuda"), torch.bfloat16)
    assert (chosen.pattention.name, chosen.loss.name) == ("triton", "triton")
    assert without_pattention_kernels(chosen, "no compiler").loss.name == "eager"
    assert (
        choose_kernels(REQUESTED | {"pattention": "eager"}, torch.device("cuda"), torch.bfloat16).loss.name == "eager"
    )


def test_a_cpu_computes_the_loss_with_pytorch():
    assert choose_kernels(REQUESTED, CPU, torch.float32).loss.name == "eager"


def test_a_loss_that_can_not_be_built_is_found_before_the_first_step():
    values = {"layer": "transformer", "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 60}
    model = TokenFormer(parse_config(ModelConfig, values | {"ffn_tokens": 8}, "test"))
    kernels = choose_kernels(REQUESTED, CPU, torch.float32)
    choose_computation(model, kernels, "none")
    assert warm_up_kernels(model, Mesh(CPU), rows=4, dtype=torch.float32) is None
    model.output_weight.loss_kernels = BrokenLoss()
    failure = warm_up_kernels(model, Mesh(CPU), rows=4, dtype=torch.float32)
    assert failure is not None
    assert "Failed to find C compiler" in failure
