"""Triton programs for `TritonKernels`. Each handles ROWS rows of n scores, in blocks of BLOCK columns.

Columns past n and rows past `count` exist in registers only and are not stored: such a column holds a score that
contributes nothing (0, or -inf for softmax), and such a row reads the last row again. All arithmetic is in fp32.
"""

import triton
import triton.language as tl

from megatron_tf.tokenformer.normalization import EPSILON

L2_NORM_GELU = tl.constexpr(0)
GELU_L2_NORM = tl.constexpr(1)
SOFTMAX = tl.constexpr(2)
_EPSILON = tl.constexpr(EPSILON)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _rows(count, ROWS: tl.constexpr):
    """Return the indices [ROWS] of the rows that this program reads, and which of them it writes."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # times n it exceeds 2^31 in a large micro-batch
    return tl.minimum(index, count - 1), index < count


@triton.jit
def _load(pointer, row, columns, n: tl.constexpr, other: tl.constexpr):
    return tl.load(pointer + (row * n)[:, None] + columns[None, :], mask=(columns < n)[None, :], other=other)


@triton.jit
def _load_scores(scores, row, columns, n: tl.constexpr, NORM: tl.constexpr):
    # exp(a + f) must be 0 for a column past n, whatever f is: infinity times a gradient of 0 would be NaN
    return _load(scores, row, columns, n, -_INFINITY) if NORM == SOFTMAX else _load(scores, row, columns, n, 0.0)


@triton.jit
def _store(pointer, value, row, columns, is_row, n: tl.constexpr):
    tl.store(pointer + (row * n)[:, None] + columns[None, :], value, mask=is_row[:, None] & (columns < n)[None, :])


@triton.jit
def fast_exp(x):
    """Return e^x in two instructions, with subnormal results flushed to zero; tl.exp takes five."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _normal_density(x):
    return 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)


@triton.jit
def _normal_cdf(x, density):
    """Return the normal distribution's cdf, given its density at x, in 15 instructions; erf takes 28.

    The lower tail is the density times a function that a polynomial in 1 / (1 + 0.3 |x|) approximates within 1.2e-7 of
    its value, as in csrc/normalization.hpp.
    """
    root = tl.rsqrt(1.0 + 0.3 * tl.abs(x))
    t = root * root  # one instruction each; a division takes eight
    p = 0.090461408 * t - 0.398388181
    p = p * t + 0.524754208
    p = p * t - 0.141499934
    p = p * t + 0.325943694
    p = p * t + 0.249321870
    p = p * t + 0.302866667
    p = p * t + 0.299854256
    tail = p * t * density
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _factor(statistic, tau, NORM: tl.constexpr):
    """Return the factor f [ROWS] of each row from its statistic over all ranks."""
    return tl.log(tau) - statistic if NORM == SOFTMAX else tau / tl.sqrt(statistic + _EPSILON)


@triton.jit
def _scale(tau, NORM: tl.constexpr):
    """Return 1 / tau^p, which turns the inner product c into the term that the gradient subtracts."""
    return 1.0 / tau if NORM == SOFTMAX else 1.0 / (tau * tau)


@triton.jit
def _weights(a, f, NORM: tl.constexpr):
    if NORM == L2_NORM_GELU:
        u = a * f
        p = u * _normal_cdf(u, _normal_density(u))
    elif NORM == GELU_L2_NORM:
        p = a * _normal_cdf(a, _normal_density(a)) * f
    else:
        p = fast_exp(a + f)
    return p


@triton.jit
def _before_norm(a, f, dp, NORM: tl.constexpr):
    """Return the weights, the terms of the inner product c, and an expensive intermediate for `_after_norm`."""
    if NORM == L2_NORM_GELU:
        u = a * f
        density = _normal_density(u)
        cdf = _normal_cdf(u, density)
        p = u * cdf
        kept = dp * (cdf + u * density)
        terms = kept * u
    elif NORM == GELU_L2_NORM:
        kept = _normal_cdf(a, _normal_density(a))
        p = a * kept * f
        terms = dp * p
    else:
        kept = fast_exp(a + f)
        p = kept
        terms = dp * p
    return p, terms, kept


@triton.jit
def _after_norm(a, f, dp, kept, share, NORM: tl.constexpr):
    """Return the gradient of the scores."""
    if NORM == L2_NORM_GELU:
        da = (kept - a * (f * share)) * f
    elif NORM == GELU_L2_NORM:
        da = (dp - a * kept * (f * share)) * f * (kept + a * _normal_density(a))
    else:
        da = kept * (dp - share)
    return da


@triton.jit
def _statistic_of_held(held, PARTS: tl.constexpr, NORM: tl.constexpr):
    """Return the statistic [ROWS] of whole rows, held as PARTS blocks."""
    if NORM == SOFTMAX:
        highest = held[0].to(tl.float32)
        for part in tl.static_range(1, PARTS):
            highest = tl.maximum(highest, held[part].to(tl.float32))
        top = tl.max(highest, 1)
        total = fast_exp(held[0].to(tl.float32) - top[:, None])
        for part in tl.static_range(1, PARTS):
            total += fast_exp(held[part].to(tl.float32) - top[:, None])
        result = top + tl.log(tl.sum(total, 1))
    else:
        total = _squares(held[0].to(tl.float32), NORM)
        for part in tl.static_range(1, PARTS):
            total += _squares(held[part].to(tl.float32), NORM)
        result = tl.sum(total, 1)
    return result


@triton.jit
def _squares(a, NORM: tl.constexpr):
    """Return the terms whose sum is the squared norm."""
    if NORM == GELU_L2_NORM:
        a = a * _normal_cdf(a, _normal_density(a))
    return a * a


@triton.jit
def _statistic(scores, row, n: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return this rank's part of the statistic [ROWS]; reads rows of any length from memory."""
    if NORM == SOFTMAX:
        top = tl.full((ROWS,), -_INFINITY, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, n, BLOCK):
            # each block has a valid column, so the new maximum is finite and no difference is inf - inf
            a = _load_scores(scores, row, start + tl.arange(0, BLOCK), n, NORM).to(tl.float32)
            new = tl.maximum(top, tl.max(a, 1))
            total = total * fast_exp(top - new) + tl.sum(fast_exp(a - new[:, None]), 1)
            top = new
        result = top + tl.log(total)
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, n, BLOCK):
            a = _load_scores(scores, row, start + tl.arange(0, BLOCK), n, NORM).to(tl.float32)
            total += _squares(a, NORM)
        result = tl.sum(total, 1)
    return result


@triton.jit
def forward_held(
    scores,
    tau,
    factor,
    weights,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute factor and weights of rows that fit in registers; each score is read once."""
    row, is_row = _rows(count, ROWS)
    held = ()
    for part in tl.static_range(PARTS):
        held += (_load_scores(scores, row, part * BLOCK + tl.arange(0, BLOCK), n, NORM),)
    f = _factor(_statistic_of_held(held, PARTS, NORM), tl.load(tau + row), NORM)
    tl.store(factor + row, f, mask=is_row)
    for part in tl.static_range(PARTS):
        p = _weights(held[part].to(tl.float32), f[:, None], NORM)
        _store(weights, p, row, part * BLOCK + tl.arange(0, BLOCK), is_row, n)


@triton.jit
def forward_long(
    scores,
    tau,
    factor,
    weights,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute factor and weights of rows of any length; scores are read twice, the second time from a cache."""
    row, is_row = _rows(count, ROWS)
    f = _factor(_statistic(scores, row, n, NORM, ROWS, BLOCK), tl.load(tau + row), NORM)
    tl.store(factor + row, f, mask=is_row)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = _load_scores(scores, row, columns, n, NORM).to(tl.float32)
        _store(weights, _weights(a, f[:, None], NORM), row, columns, is_row, n)


@triton.jit
def statistic_part(
    scores, statistic, count, n: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute this rank's part of the statistic of rows that are sharded over ranks."""
    row, is_row = _rows(count, ROWS)
    tl.store(statistic + row, _statistic(scores, row, n, NORM, ROWS, BLOCK), mask=is_row)


@triton.jit
def weights_part(
    scores,
    statistic,
    tau,
    factor,
    weights,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute factor and weights of one block of columns from the statistic over all ranks."""
    row, is_row = _rows(count, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    f = _factor(tl.load(statistic + row), tl.load(tau + row), NORM)
    tl.store(factor + row, f, mask=is_row & (tl.program_id(1) == 0))
    a = _load_scores(scores, row, columns, n, NORM).to(tl.float32)
    _store(weights, _weights(a, f[:, None], NORM), row, columns, is_row, n)


@triton.jit
def backward_held(
    scores,
    factor,
    grad,
    tau,
    weights,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Recompute the weights and overwrite their gradient with that of the scores, for rows that fit in registers."""
    row, is_row = _rows(count, ROWS)
    f = tl.load(factor + row)[:, None]
    held, gradients, kept = (), (), ()
    for part in tl.static_range(PARTS):
        columns = part * BLOCK + tl.arange(0, BLOCK)
        held += (_load_scores(scores, row, columns, n, NORM),)
        gradients += (_load(grad, row, columns, n, 0.0),)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        # recomputed: the scores are read anyway, and saving the weights too would double the memory
        p, terms, slow = _before_norm(held[part].to(tl.float32), f, gradients[part].to(tl.float32), NORM)
        _store(weights, p, row, part * BLOCK + tl.arange(0, BLOCK), is_row, n)
        total += terms
        kept += (slow,)
    share = (tl.sum(total, 1) * _scale(tl.load(tau + row), NORM))[:, None]
    for part in tl.static_range(PARTS):
        a, dp = held[part].to(tl.float32), gradients[part].to(tl.float32)
        da = _after_norm(a, f, dp, kept[part], share, NORM)
        _store(grad, da, row, part * BLOCK + tl.arange(0, BLOCK), is_row, n)


@triton.jit
def _inner(
    scores,
    f,
    grad,
    weights,
    row,
    is_row,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return this rank's part of the inner product c [ROWS] of rows of any length; stores the weights."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a = _load_scores(scores, row, columns, n, NORM).to(tl.float32)
        dp = _load(grad, row, columns, n, 0.0).to(tl.float32)
        p, terms, _ = _before_norm(a, f, dp, NORM)
        _store(weights, p, row, columns, is_row, n)
        total += terms
    return tl.sum(total, 1)


@triton.jit
def _subtract(scores, f, grad, share, row, columns, is_row, n: tl.constexpr, NORM: tl.constexpr):
    """Overwrite the gradient of the weights in these columns with that of the scores."""
    a = _load_scores(scores, row, columns, n, NORM).to(tl.float32)
    dp = _load(grad, row, columns, n, 0.0).to(tl.float32)
    _, _, kept = _before_norm(a, f, dp, NORM)
    _store(grad, _after_norm(a, f, dp, kept, share, NORM), row, columns, is_row, n)


@triton.jit
def backward_long(
    scores,
    factor,
    grad,
    tau,
    weights,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute `backward_held` for rows of any length; inputs are read twice, the second time from a cache."""
    row, is_row = _rows(count, ROWS)
    f = tl.load(factor + row)[:, None]
    inner = _inner(scores, f, grad, weights, row, is_row, n, NORM, ROWS, BLOCK)
    share = (inner * _scale(tl.load(tau + row), NORM))[:, None]
    for start in range(0, n, BLOCK):
        _subtract(scores, f, grad, share, row, start + tl.arange(0, BLOCK), is_row, n, NORM)


@triton.jit
def inner_part(
    scores,
    factor,
    grad,
    weights,
    inner,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Recompute the weights, and compute this rank's part of the inner product of rows sharded over ranks."""
    row, is_row = _rows(count, ROWS)
    f = tl.load(factor + row)[:, None]
    tl.store(inner + row, _inner(scores, f, grad, weights, row, is_row, n, NORM, ROWS, BLOCK), mask=is_row)


@triton.jit
def gradient_part(
    scores,
    factor,
    grad,
    inner,
    tau,
    count,
    n: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of the scores in one block of columns from the inner product over all ranks."""
    row, is_row = _rows(count, ROWS)
    share = tl.load(inner + row) * _scale(tl.load(tau + row), NORM)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _subtract(scores, tl.load(factor + row)[:, None], grad, share[:, None], row, columns, is_row, n, NORM)
