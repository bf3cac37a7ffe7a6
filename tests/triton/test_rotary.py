"""The rotary embedding's Triton kernel in Triton's interpreter; run with TRITON_INTERPRET=1, as tests/run.sh does."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from megatron_tf.kernels import rotary, triton_rotary
from megatron_tf.layers.rotary import rotary_tables

assert os.environ.get("TRITON_INTERPRET") == "1"
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["the same positions", "positions of each sample"])
@pytest.mark.parametrize("heads, width, dim", [(2, 16, 16), (3, 24, 8), (5, 12, 12), (1, 6, 2)])
def test_it_equals_pytorch_in_float64_forward_and_backward(heads, width, dim, shared, dtype):
    generator = torch.Generator().manual_seed(heads)
    qkv = torch.randn(3, 4, 2, heads, width, generator=generator).to(dtype).requires_grad_()
    positions = torch.randint(50, (4, 1 if shared else 2), generator=generator)
    tables = [table.to(dtype) for table in rotary_tables(positions, dim, 10000.0)]
    grads = [torch.randn(4, 2, heads, width, generator=generator).to(dtype) for _ in range(3)]
    # as attention returns them: other strides
    grads = [grad.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for grad in grads]
    wide = qkv.detach().double().requires_grad_()
    expected = rotary.rotate(wide, *(table.double() for table in tables))
    found = triton_rotary.rotate(qkv, *tables)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    torch.autograd.backward(found, grads)
    for mine, theirs in zip([*found, qkv.grad], [*expected, wide.grad], strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        torch.testing.assert_close(mine.double(), theirs, rtol=ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    assert torch.equal(found[2], qkv[2]), "values are not rotated"


def test_float64_is_left_to_pytorch():
    qkv = torch.randn(3, 4, 2, 2, 8, dtype=torch.float64)
    tables = [table.double() for table in rotary_tables(torch.arange(4)[:, None], 8, 10000.0)]
    for mine, theirs in zip(triton_rotary.rotate(qkv, *tables), rotary.rotate(qkv, *tables), strict=True):
        assert torch.equal(mine, theirs)
