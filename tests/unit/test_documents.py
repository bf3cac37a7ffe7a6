"""Attention over many documents at once, by stand-ins for packages that need a GPU, against one document at a time."""

import inspect
import sys
import types

import numpy as np
import pytest
import torch

from megatron_tf.data.batch import document_lengths
from megatron_tf.kernels import documents as module
from megatron_tf.kernels.adapters import sdpa
from megatron_tf.kernels.dispatch import choose_kernels
from megatron_tf.kernels.documents import AttendEach, AttendTogether, Documents
from tests.support.signatures import KNOWN, as_published, versions_of

STARTS = np.array([[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 1]])
DOCUMENTS = Documents(torch.from_numpy(STARTS), torch.from_numpy(document_lengths(STARTS)))


def sequences(q, k, v, bounds):
    """Causal attention of each sequence between the bounds."""
    assert bounds.dtype == torch.int32
    pieces = zip(*(t.split(bounds.diff().tolist()) for t in (q, k, v)), strict=True)
    return torch.cat([sdpa(*(t[:, None] for t in piece))[:, 0] for piece in pieces if len(piece[0])])


def of_flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    assert causal
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k == STARTS.shape[1]
    return sequences(q, k, v, cu_seqlens_q)


def of_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert query.shape[-1] % 8 == 0
    assert window_size == (-1, 0)
    return of_flash_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=True)


def of_torch_before(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[-1] % 8 == 0
    return of_flash_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal)


def assert_equals_one_by_one(varlen, width):
    generator = torch.Generator().manual_seed(width)
    make = lambda: torch.randn(7, 2, 3, width, dtype=torch.float64, generator=generator)  # noqa: E731
    inputs, dy = [make().requires_grad_() for _ in range(3)], make()
    found, expected = AttendTogether(varlen)(*inputs, DOCUMENTS), AttendEach()(*inputs, DOCUMENTS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out, inputs, dy) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("package, version", versions_of("flash_attn", "flash_attn_4"))
def test_flash_attn_computes_documents_as_one_by_one(monkeypatch, package, version):
    is_new = package == "flash_attn_4"
    both = lambda **options: (of_flash_attn(**options), torch.zeros(1))  # noqa: E731
    function = as_published(KNOWN[package][version], "flash_attn_varlen_func", both if is_new else of_flash_attn)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["flash_attn.cute" if is_new else "flash_attn"].flash_attn_varlen_func = function
    assert_equals_one_by_one(module.flash_varlen(version_4=is_new), 8)


@pytest.mark.parametrize("function", [of_torch, of_torch_before])
@pytest.mark.parametrize("width", [8, 5, 12])
def test_torch_computes_documents_as_one_by_one(monkeypatch, function, width):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    assert_equals_one_by_one(module.torch_varlen(), width)


def test_the_installed_torch_takes_what_it_is_given(monkeypatch):
    """Its own signature, which the stand-ins above only claim to have."""
    function = inspect.unwrap(torch.nn.attention.varlen.varlen_attn)
    seen = []

    def held(*arguments, **options):
        seen.append(inspect.signature(function).bind(*arguments, **options).arguments)
        return arguments[0]

    held.__signature__ = inspect.signature(function)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", held)
    module.torch_varlen()(*(torch.ones(4, 1, 8) for _ in range(3)), torch.tensor([0, 4], dtype=torch.int32), 4)
    assert seen[0].get("window_size") == (-1, 0) or seen[0].get("is_causal") is True


REQUESTED = {"pattention": "eager", "norm": "torch", "optimizer": "torch"}


@pytest.mark.parametrize(
    "device, dtype, capability, is_together",
    [
        ("cuda", torch.bfloat16, (9, 0), True),
        ("cuda", torch.float16, (8, 0), True),
        ("cuda", torch.float16, (7, 5), False),
        ("cuda", torch.float32, (9, 0), False),
        ("cpu", torch.bfloat16, None, False),
    ],
    ids=str,
)
def test_torch_takes_all_documents_at_once_where_it_has_flash_attention(
    monkeypatch, device, dtype, capability, is_together
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels = choose_kernels(REQUESTED | {"attention": "sdpa"}, torch.device(device), dtype)
    assert isinstance(kernels.attend_documents, AttendTogether if is_together else AttendEach)
    assert kernels.attend_documents.reads_on_host != is_together


def test_flash_attn_takes_all_documents_at_once(monkeypatch):
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = package.flash_attn_varlen_func = of_flash_attn
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("megatron_tf.kernels.adapters.is_installed", lambda name: name == "flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    requested = REQUESTED | {"attention": "flash_attn"}
    kernels = choose_kernels(requested, torch.device("cuda"), torch.bfloat16)
    assert isinstance(kernels.attend_documents, AttendTogether)
