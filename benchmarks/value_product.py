"""Cost of exact growth: the product of weights and values summed in fixed blocks of tokens, against one `torch.mm`.

The two alternate in this process; the figures are the ratio of the fastest of 30 runs, and the change of the result
when tokens of weight zero are appended. Run on an idle machine: python benchmarks/value_product.py
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_tf.kernels.value_product import mix_values

SHAPES = [(4096, 3072, 768), (4096, 2048, 512), (2048, 1024, 128), (512, 768, 192)]  # rows, tokens, width
TURNS = 30


def plain(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """Compute the product with the BLAS's order of summation."""
    torch.mm(weights, values, out=out)


def seconds(product: Callable[[Tensor, Tensor, Tensor], None], *tensors: Tensor) -> float:
    """Measure one call, in seconds."""
    start = time.perf_counter()
    product(*tensors)
    return time.perf_counter() - start


def moved_by_growth(product: Callable[[Tensor, Tensor, Tensor], None], weights: Tensor, values: Tensor) -> float:
    """Return the largest relative change of the result when tokens of weight zero are appended."""
    outs = [torch.empty(len(weights), values.shape[1]) for _ in range(2)]
    product(weights, values, outs[0])
    grown = torch.cat([weights, torch.zeros_like(weights)], 1), torch.cat([values, torch.randn_like(values)])
    product(*grown, outs[1])
    return float((outs[0] - outs[1]).abs().max() / outs[0].abs().max())


def main() -> None:
    """Print a line for each shape."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, fp32")
    print("rows x tokens x width   blocks/mm time   moved by growth: blocks, mm")
    for rows, tokens, width in SHAPES:
        weights, values, out = torch.randn(rows, tokens), torch.randn(tokens, width), torch.empty(rows, width)
        turns = [
            (seconds(mix_values, weights, values, out), seconds(plain, weights, values, out)) for _ in range(TURNS)
        ]
        ratio = min(blocks for blocks, _ in turns) / min(mm for _, mm in turns)
        part = weights[:, : tokens // 3], values[: tokens // 3]
        moved = [moved_by_growth(product, *part) for product in (mix_values, plain)]
        print(f"{rows:>5} x {tokens:>5} x {width:>4}     {ratio:>12.3f}     {moved[0]:>14.1e} {moved[1]:>9.1e}")


if __name__ == "__main__":
    main()
