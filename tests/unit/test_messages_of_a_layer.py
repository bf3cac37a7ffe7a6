"""The messages of a layer on tensor-parallel ranks, by the formulas of docs/parallelism.md."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.model.block import Block
from megatron_tf.training.dry_run.fake_world import DEVICE, fake_rank

LENGTH, SAMPLES, WIDTH = 16, 3, 64
TOKENS = LENGTH * SAMPLES
KINDS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


class Messages(TorchDispatchMode):
    """Counts the collectives and the elements of their larger sides, by kind and type."""

    def __init__(self):
        super().__init__()
        self.calls, self.elements = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = KINDS[func.overloadpacket.__name__]
            tensors = args[0] if kind == "all-reduce" else args[:2]
            self.calls[kind] += 1
            self.elements[kind, tensors[0].dtype] += max(tensor.numel() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def messages_of_a_layer(ranks, dtype, *, sequence_parallel, norm="l2_norm_gelu", multiple=1, chunks=1):
    """(forward, backward): the messages of one layer with `multiple` times as many parameter tokens."""
    tokens = {"qkv_tokens": 32 * multiple, "proj_tokens": 16 * multiple, "ffn_tokens": 64 * multiple}
    values = {"num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 8, "norm_activation": norm} | tokens
    with fake_rank(0, tensor=ranks, pipeline=1, data=1) as mesh, DEVICE:
        config = parse_config(ModelConfig, values | {"vocab_size": 64}, "test")
        block = Block(config, 0, group=mesh.group("tp"), sequence_parallel=sequence_parallel)
        for pattention in filter(lambda module: isinstance(module, Pattention), block.modules()):
            pattention.message_chunks = chunks
        rows = LENGTH // ranks if sequence_parallel else LENGTH
        x = torch.empty(rows, SAMPLES, WIDTH, dtype=dtype, requires_grad=True)
        tables = rotary_tables(torch.arange(LENGTH)[:, None], 2, 10000.0, dtype=torch.float32)
        with Messages() as forward:
            y = block(x, tuple(table.to(dtype) for table in tables))
        with Messages() as backward:
            y.backward(torch.empty_like(y))
    return forward, backward


WHOLE = [
    {"all-gather": (1, 1), "reduce-scatter": (1, 3), "all-reduce": (2, 2)},
    {"all-gather": (1, 3), "reduce-scatter": (1, 1), "all-reduce": (2, 2)},
]
SEQUENCE = [
    {"all-gather": (3, 3), "reduce-scatter": (3, 5)},
    {"all-gather": (6, 8), "reduce-scatter": (3, 3)},
]
"""Forward and backward: kind -> messages, and activations [T, D] in them, without and with sequence parallelism."""
STATISTICS = 3, 5
"""All-reduces of statistics in a pass (query, key and value together, proj, ffn), and numbers of a token in them."""
TYPES = pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=["fp32", "bf16", "fp64"],
)


def assert_are(messages, activations, dtype, wide, reductions=1):
    """Compare with activations in `dtype` and, for each statistic, this many reductions in `wide`."""
    calls, elements = Counter(), Counter()
    for kind, (count, size) in activations.items():
        calls[kind] += count
        elements[kind, dtype] += size * TOKENS * WIDTH
    calls["all-reduce"] += reductions * STATISTICS[0]
    elements["all-reduce", wide] += reductions * STATISTICS[1] * TOKENS
    assert messages.calls == calls
    assert messages.elements == elements


@TYPES
@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_they_are_those_of_the_formula(ranks, dtype, wide, sequence_parallel):
    found = messages_of_a_layer(ranks, dtype, sequence_parallel=sequence_parallel)
    for messages, activations in zip(found, SEQUENCE if sequence_parallel else WHOLE, strict=True):
        assert_are(messages, activations, dtype, wide)


def test_softmax_reduces_a_maximum_first():
    forward, backward = messages_of_a_layer(2, torch.bfloat16, sequence_parallel=True, norm="softmax")
    assert_are(forward, SEQUENCE[0], torch.bfloat16, torch.float32, reductions=2)
    assert_are(backward, SEQUENCE[1], torch.bfloat16, torch.float32)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_more_parameter_tokens_send_no_more(sequence_parallel):
    one, *grown = (
        messages_of_a_layer(4, torch.bfloat16, sequence_parallel=sequence_parallel, multiple=multiple)
        for multiple in (1, 2, 4, 8)
    )
    for passes in grown:
        assert [(each.calls, each.elements) for each in passes] == [(each.calls, each.elements) for each in one]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
def test_chunks_send_the_same_bytes_in_more_messages(sequence_parallel):
    chunks, dtype = 3, torch.bfloat16
    found = messages_of_a_layer(2, dtype, sequence_parallel=sequence_parallel, chunks=chunks)
    for messages, activations in zip(found, SEQUENCE if sequence_parallel else WHOLE, strict=True):
        elements = Counter({(kind, dtype): size * TOKENS * WIDTH for kind, (_, size) in activations.items()})
        elements["all-reduce", torch.float32] = STATISTICS[1] * TOKENS
        calls = Counter({kind: chunks * count for kind, (count, _) in activations.items()})
        calls["all-reduce"] += STATISTICS[0]
        assert messages.elements == elements
        assert messages.calls == calls
