"""Check the loss fused with the head, dropout masks and fp8 products on the device."""

import importlib.util

import torch
import torch.nn.functional as F

from benchmarks.gpu_report.correctness import relative_error
from benchmarks.gpu_report.result import Result
from benchmarks.gpu_report.scale import Scale
from benchmarks.gpu_report.timing import paired_milliseconds
from megatron_tf.kernels.dropout import drop
from megatron_tf.kernels.fp8 import Fp8Products
from megatron_tf.kernels.loss import EagerLoss, LossKernels
from megatron_tf.layers.cross_entropy import IGNORE_INDEX, head_loss

MIB = 1 << 20


def loss(scale: Scale, result: Result) -> None:
    """Check the loss fused with the head against float64, and time it against its three products."""
    for kernels in _loss_kernels(scale):
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
            name = f"{kernels.name} loss in {str(dtype).removeprefix('torch.')}"
            with result.guarded(name):
                found = _head_loss_error(kernels, scale, dtype)
                result.at_most(f"{name}: relative error of gradients", found, limit)
        with result.guarded(f"{kernels.name} loss, time"):
            _loss_figures(kernels, scale, result)


def _loss_kernels(scale: Scale) -> list[LossKernels]:
    kernels: list[LossKernels] = [EagerLoss()]
    if scale.device.type == "cuda" and importlib.util.find_spec("triton"):
        from megatron_tf.kernels.triton_loss import TritonLoss

        kernels.append(TritonLoss())
    return kernels


def _head_loss_error(kernels: LossKernels, scale: Scale, dtype: torch.dtype) -> float:
    """Return the largest relative error of the loss and both gradients, with ignored targets and large logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(193, 64, generator=generator, dtype=torch.float64).to(dtype).to(scale.device)
    weight = torch.randn(1013, 64, generator=generator, dtype=torch.float64).to(dtype).to(scale.device)
    targets = torch.randint(1013, (193,), generator=generator).to(scale.device)
    targets[::7] = IGNORE_INDEX
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].t(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / 100
    expected.backward()
    ours = [hidden.clone().requires_grad_(), weight.float().requires_grad_()]
    found = head_loss(ours[0], ours[1], targets, divisor=100.0, group=None, kernels=kernels)
    found.backward()
    errors = [relative_error(mine.grad, theirs.grad) for mine, theirs in zip(ours, wide, strict=True)]
    return max([relative_error(found, expected), *(float("inf") if e != e else e for e in errors)])


def _loss_figures(kernels: LossKernels, scale: Scale, result: Result) -> None:
    shape = scale.large
    tokens = scale.micro_batch * shape.seq_length // 2
    size = {"device": scale.device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, shape.width, **size, requires_grad=True)
    weight = (0.02 * torch.randn(shape.vocabulary, shape.width, device=scale.device)).requires_grad_()
    cast = weight.detach().bfloat16()
    targets = torch.randint(shape.vocabulary, (tokens,), device=scale.device)
    logits = torch.randn(tokens // 4, shape.vocabulary, **size)

    def ours() -> None:
        divisor = float(tokens)
        head_loss(hidden, weight, targets, divisor=divisor, group=None, kernels=kernels, cast_weight=cast).backward()
        hidden.grad = weight.grad = None

    def products() -> None:
        for rows in hidden.detach().chunk(4):
            torch.mm(rows, cast.t(), out=logits)
            torch.mm(logits, cast)
            torch.mm(logits.t(), rows)

    times = paired_milliseconds({"ours": ours, "products": products}, scale.device, turns=max(3, scale.turns // 2))
    peak = 0
    if scale.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        peak = torch.cuda.max_memory_allocated() - before
    columns = ["kernels", "ms", "bare products, ms", "ratio", "peak beyond the inputs, MiB"]
    row = result.table(f"Loss and head, forward and backward: {tokens} x {shape.width} x {shape.vocabulary}", *columns)
    ratio = f"{times['ours'] / times['products']:.2f}"
    row(kernels.name, f"{times['ours']:.2f}", f"{times['products']:.2f}", ratio, f"{peak / MIB:,.0f}")


def dropout(scale: Scale, result: Result) -> None:
    """Check that the device drops the same elements as a CPU, with and without a residual, forward and backward."""
    choices = {"PyTorch": drop}
    if scale.device.type == "cuda" and importlib.util.find_spec("triton"):
        from megatron_tf.kernels import triton_dropout

        choices["Triton"] = triton_dropout.drop
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 257, generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (5, 3), generator=generator)
    for with_residual in (False, True):
        residual = torch.randn(x.shape, generator=generator) if with_residual else None
        expected = _dropped(drop, x, seeds=seeds, residual=residual)
        for name, choice in choices.items():
            with result.guarded(f"dropout by {name}"):
                moved = residual if residual is None else residual.to(scale.device)
                found = _dropped(choice, x.to(scale.device), seeds=seeds.to(scale.device), residual=moved)
                worst = max(float((a.cpu() - b).abs().max()) for a, b in zip(found, expected, strict=True))
                what = "with a residual" if with_residual else "alone"
                result.at_most(f"dropout by {name}, {what}: largest difference from a CPU", worst, 1e-6)


def _dropped(choice, x: torch.Tensor, seeds: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the output and the gradient of x."""
    x = x.clone().requires_grad_()
    out = choice(x, seeds, stream=7, rate=0.3, residual=residual)
    out.square().sum().backward()
    return [out.detach(), x.grad]


def fp8(scale: Scale, result: Result) -> None:
    """Check fp8 products against the same products on a CPU, and time them against bf16."""
    if scale.device.type == "cuda" and torch.cuda.get_device_capability(scale.device) < (8, 9):
        result.skip("fp8 needs a GPU of compute capability 8.9 or later")
        return
    columns = ["rows x inner x columns", "scaling", "bf16, ms", "fp8, ms", "ratio"]
    row = result.table("Products in fp8, scaling and cast of the operands included", *columns)
    for scaling in ("tensorwise", "rowwise"):
        for side in (None, "left", "right"):
            name = f"fp8 {scaling}, gradient {side or 'none'}"
            with result.guarded(name):
                generator = torch.Generator().manual_seed(0)
                a = torch.randn(256, 512, generator=generator).bfloat16()
                b = torch.randn(512, 384, generator=generator).bfloat16()
                compiled = Fp8Products(scaling, is_compiled=scale.device.type == "cuda")
                found = compiled.mm(a.to(scale.device), b.to(scale.device), gradient=side).cpu()
                expected = Fp8Products(scaling).mm(a, b, gradient=side)
                result.at_most(f"{name}: relative difference from a CPU", relative_error(found, expected), 2**-6)
        with result.guarded(f"fp8 {scaling}, time"):
            _fp8_figures(scale, scaling, row)


def _fp8_figures(scale: Scale, scaling, row) -> None:
    rows, width, tokens = scale.layers[len(scale.layers) // 2]
    a = torch.randn(rows, width, device=scale.device, dtype=torch.bfloat16)
    b = torch.randn(tokens, width, device=scale.device, dtype=torch.bfloat16).t()
    products = Fp8Products(scaling, is_compiled=scale.device.type == "cuda")
    works = {"bf16": lambda: torch.mm(a, b), "fp8": lambda: products.mm(a, b)}
    times = paired_milliseconds(works, scale.device, turns=scale.turns, calls=4)
    ratio = f"{times['fp8'] / times['bf16']:.2f}"
    row(f"{rows} x {width} x {tokens}", scaling, f"{times['bf16']:.2f}", f"{times['fp8']:.2f}", ratio)
