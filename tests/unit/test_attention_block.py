"""Attention to blocks of keys, merged by their log-sum-exp, is attention to all keys; gradients too."""

import pytest
import torch

from megatron_tf.kernels import attention_block

KERNELS = {
    "flash": (attention_block.attend_block, attention_block.attend_block_backward),
    "eager": (attention_block.attend_block_eagerly, attention_block.attend_block_backward_eagerly),
}


def operands(dtype=torch.float64):
    """q, k, v and the gradient of the output, of 7 queries and 7 + 5 keys: a causal block after a whole one."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 3, length, 6) for length in (7, 12, 12, 7)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def textbook(q, k, v, grad):
    """The output and the gradients of q, k and v, by autograd; queries attend to all of the first 5 keys."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    scores = q @ k.mT / 6**0.5
    mask = torch.arange(12) > torch.arange(7)[:, None] + 5
    out = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def by_blocks(q, k, v, grad, *, attend, backward):
    """The same from two blocks."""
    blocks = [(slice(5), False), (slice(5, 12), True)]
    parts = [attend(q, k[:, :, keys], v[:, :, keys], is_causal=is_causal) for keys, is_causal in blocks]
    log_sums = torch.stack([log_sum for _, log_sum in parts])
    log_sum = log_sums.logsumexp(0)
    shares = (log_sums - log_sum).exp()
    out = sum(share[..., None] * part for share, (part, _) in zip(shares, parts, strict=True)).to(q.dtype)
    grads = [
        backward(grad, q, k[:, :, keys], v[:, :, keys], out=out, log_sum=log_sum, is_causal=is_causal)
        for keys, is_causal in blocks
    ]
    dq, dk, dv = zip(*grads, strict=True)
    return [out, sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)]


@pytest.mark.parametrize(("attend", "backward"), KERNELS.values(), ids=KERNELS)
def test_blocks_are_merged_to_attention_to_all_keys(attend, backward):
    given = operands()
    for found, expected in zip(by_blocks(*given, attend=attend, backward=backward), textbook(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_blocks_in_16_bits():
    attend, backward = KERNELS["flash"]
    given = operands(torch.bfloat16)
    for found, expected in zip(by_blocks(*given, attend=attend, backward=backward), textbook(*given), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
