"""Intra-document masking: causal attention in which a token attends only to tokens of its own document."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels.adapters import Attend, sdpa

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, cu_seqlens, max_seqlen) -> output [T, h, d]: causal attention within packed sequences, scaled by 1/sqrt(d).

q, k and v are [T, h, d]. cu_seqlens, int32 [N + 1], holds the start of each sequence and the end of the last one;
max_seqlen is an upper bound of their lengths."""


@dataclass(frozen=True)
class Documents:
    """Document boundaries in the samples of a micro-batch."""

    starts: Tensor
    """int64 [B, S], on the device: index in the sample at which each token's document starts."""
    lengths: Tensor
    """int32 [B, M]: lengths of each sample's documents, padded with zeros; on the host if
    `AttendDocuments.reads_on_host`, otherwise on the device."""

    @cached_property
    def on_host(self) -> list[list[int]]:
        """Return the lengths of each sample's documents as lists."""
        lengths: list[list[int]] = self.lengths.tolist()
        return lengths

    @cached_property
    def bounds(self) -> Tensor:
        """Return cu_seqlens of the concatenated samples, int32 [B M + 1], on the device."""
        return F.pad(self.lengths.flatten().cumsum(0, dtype=torch.int32), (1, 0))


class AttendDocuments(Protocol):
    """Implementation of intra-document attention."""

    @property
    def reads_on_host(self) -> bool:
        """Whether document lengths must be on the host; otherwise they must be on the device."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Attend to q, k, v [S, B, h, d] -> [S, B, h, d], without an S x S mask and without work across documents."""


@dataclass(frozen=True)
class AttendEach(AttendDocuments):
    """One attention call per document, for devices and dtypes without variable-length attention."""

    attend: Attend = sdpa
    reads_on_host: ClassVar[bool] = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        samples = []
        for b, lengths in enumerate(documents.on_host):
            sizes = [length for length in lengths if length]
            pieces = zip(*(t[:, b : b + 1].split(sizes) for t in (q, k, v)), strict=True)
            samples.append(torch.cat([self.attend(*piece) for piece in pieces]))
        return torch.cat(samples, 1)


@dataclass(frozen=True)
class AttendTogether(AttendDocuments):
    """One variable-length attention call for all documents; its shapes depend only on B, S and M."""

    varlen: Varlen
    reads_on_host: ClassVar[bool] = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        length, samples = q.shape[:2]
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))
        # the sequence length is an upper bound; the exact maximum would have to be read on the host
        out = self.varlen(q, k, v, documents.bounds, length)
        return out.unflatten(0, (samples, length)).transpose(0, 1)


def torch_varlen() -> Varlen:
    """Wrap torch's varlen_attn, a flash attention for 16-bit types."""
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    # torch has renamed the argument
    is_old = "window_size" not in inspect.signature(function).parameters
    causal = {"is_causal": True} if is_old else {"window_size": (-1, 0)}

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        width = q.shape[-1]
        padded = -(-width // 8) * 8  # its kernels need head widths that are multiples of 8
        if padded != width:
            q = q * (padded / width) ** 0.5  # the kernels scale by 1/sqrt(padded)
            q, k, v = (F.pad(t, (0, padded - width)) for t in (q, k, v))
        out: Tensor = function(q, k, v, bounds, bounds, longest, longest, **causal)
        return out[..., :width]

    return varlen


def flash_varlen(version_4: bool) -> Varlen:
    """Wrap flash_attn_varlen_func of flash-attn 2, or of flash-attn 4."""
    function = importlib.import_module("flash_attn.cute" if version_4 else "flash_attn").flash_attn_varlen_func

    def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
        )
        first: Tensor = out[0] if isinstance(out, tuple) else out  # version 4 also returns the log-sum-exp
        return first

    return varlen
