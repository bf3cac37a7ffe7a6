"""Measure this device: peak rates, a Pattention against an MLP, training steps, decoding."""

import gc
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_report.result import Result, read_result
from benchmarks.gpu_report.runs import parameter_bytes, random_batch, step_config
from benchmarks.gpu_report.scale import Scale, Shape
from benchmarks.gpu_report.timing import (
    is_capturable,
    kernel_times,
    milliseconds,
    paired_milliseconds,
    synchronize,
)
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.data.batch import Batch, pin
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.sampling import Sampling
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.parallelize import choose_computation
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import MicroBatches
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from megatron_tf.tokenformer.sizes import parameter_count, training_flops
from megatron_tf.training.observability.throughput import flops_by_name
from megatron_tf.training.step.state import TrainState, build_state
from megatron_tf.training.step.step import train_step

MIB, GIB = 1 << 20, 1 << 30


def ceilings(scale: Scale, result: Result) -> None:
    """Measure the peak rates that bound everything else: a large matrix product and a copy in device memory."""
    n, device = scale.square, scale.device
    row = result.table("Ceilings", "what", "rate")
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        time = milliseconds(partial(torch.mm, a, b), device, turns=scale.turns)
        name = str(dtype).removeprefix("torch.")
        result.figures[f"matmul {name} TFLOP/s"] = 2 * n**3 / time / 1e9
        row(f"torch.matmul, {n} x {n} x {n}, {name}", f"{2 * n**3 / time / 1e9:.0f} TFLOP/s")
    source = torch.randn(scale.copied_mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    time = milliseconds(lambda: target.copy_(source), device, turns=scale.turns)
    result.figures["copy GB/s"] = 2 * source.nbytes / time / 1e6
    row("copy in device memory, read and written", f"{2 * source.nbytes / time / 1e6:,.0f} GB/s")


def pattention(scale: Scale, result: Result) -> None:
    """Time one Pattention, forward and backward in bf16, against Linear -> GELU -> Linear of the same shape."""
    columns = ["rows x width x tokens", "kernels", "MLP, ms", "l2_norm_gelu", "gelu_l2_norm", "softmax"]
    row = result.table("One Pattention: time over the MLP's", *columns, "bare products", "of matmul's rate")
    for rows, width, tokens in scale.layers:
        for kernels, wrap in _kernel_choices(scale):
            with result.guarded(f"{width} x {tokens} {kernels}"):
                x = torch.randn(rows, width, device=scale.device, dtype=torch.bfloat16, requires_grad=True)
                dy = torch.randn_like(x)
                works = {"mlp": _training(wrap(_mlp(width, tokens, scale.device)), x, dy)}
                for norm in ("l2_norm_gelu", "gelu_l2_norm", "softmax"):
                    works[norm] = _training(_pattention(width, tokens, norm=norm, kernels=kernels, scale=scale), x, dy)
                works["products"] = _products(tokens, x)
                times = paired_milliseconds(works, scale.device, turns=scale.turns, calls=4)
                rate = 12 * rows * width * tokens / times["l2_norm_gelu"] / 1e9
                result.figures[f"pattention {width} {kernels} / mlp"] = times["l2_norm_gelu"] / times["mlp"]
                result.figures[f"pattention {width} {kernels} / products"] = times["products"] / times["l2_norm_gelu"]
                ratios = [f"{time / times['mlp']:.3f}" for name, time in times.items() if name != "mlp"]
                share = times["products"] / times["l2_norm_gelu"]
                row(
                    f"{rows} x {width} x {tokens}", kernels, f"{times['mlp']:.2f}", *ratios, f"{share:.2f} ({rate:.0f})"
                )


def between(scale: Scale, result: Result) -> None:
    """Time a Pattention's normalization: forward moves 2 R n elements, backward 4 R n."""
    columns = ["rows x tokens", "kernels", "norm", "forward, ms", "GB/s", "backward, ms", "GB/s"]
    row = result.table("Between the products, bf16", *columns)
    for rows, _, tokens in scale.layers:
        for kernels in _implementations(scale):
            for name, norm in NORMALIZATIONS.items():
                scores = torch.randn(rows, tokens, device=scale.device, dtype=torch.bfloat16)
                taus = torch.full((rows,), norm.initial_tau(tokens), device=scale.device)
                factor, grad = kernels.forward(norm, scores, tau=taus, reduce=None)
                forward = partial(kernels.forward, norm, scores, tau=taus, reduce=None)
                backward = partial(kernels.backward, norm, scores, factor=factor, grad=grad, tau=taus, reduce=None)
                times = paired_milliseconds(
                    {"forward": forward, "backward": backward}, scale.device, turns=scale.turns, calls=4
                )
                rates = {"forward": 2 * scores.nbytes / 1e6, "backward": 4 * scores.nbytes / 1e6}
                cells = [
                    f"{x:,.2f}" if x < 100 else f"{x:,.0f}" for k in times for x in (times[k], rates[k] / times[k])
                ]
                row(f"{rows} x {tokens}", kernels.name, name, *cells)


def _implementations(scale: Scale) -> list[PattentionKernels]:
    if scale.device.type != "cuda" or not importlib.util.find_spec("triton"):
        return [EagerKernels()]
    from megatron_tf.kernels.triton_kernels import TritonKernels

    return [TritonKernels()] if scale.is_quick else [TritonKernels(), CompiledKernels()]


def _kernel_choices(scale: Scale) -> list[tuple[str, Callable[[nn.Module], nn.Module]]]:
    """Return each choice of kernels and a wrapper of the MLP to compare with: eager with eager, fused with fused."""
    if scale.device.type == "cuda" and scale.is_quick and importlib.util.find_spec("triton"):
        return [("triton", lambda module: torch.compile(module))]
    choices: list[tuple[str, Callable[[nn.Module], nn.Module]]] = [("eager", lambda module: module)]
    if scale.device.type == "cuda":
        choices.append(("compiled", lambda module: torch.compile(module)))
        if importlib.util.find_spec("triton"):
            choices.append(("triton", lambda module: torch.compile(module)))
    return choices


def _mlp(width: int, hidden: int, device: torch.device) -> nn.Module:
    layers = [nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)]
    return nn.Sequential(*layers).to(device, torch.bfloat16)


def _pattention(width: int, tokens: int, *, norm: str, kernels: str, scale: Scale) -> Pattention:
    layer = Pattention(width, width, num_tokens=tokens, norm_activation=norm)
    nn.init.normal_(layer.key_tokens, std=0.02)
    nn.init.normal_(layer.value_tokens, std=0.02)
    layer.to(scale.device, torch.bfloat16)
    if kernels == "triton":
        from megatron_tf.kernels.triton_kernels import TritonKernels

        layer.use(TritonKernels())
    else:
        layer.use(CompiledKernels() if kernels == "compiled" else EagerKernels())
    return layer


def _training(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward."""

    def work() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(dy)

    return work


def _products(tokens: int, x: Tensor) -> Callable[[], None]:
    """Return a function that runs only the six matrix products of a Pattention, the lower bound of its time."""
    rows, width = x.shape
    keys, values = (torch.randn(tokens, width, device=x.device, dtype=x.dtype) for _ in range(2))
    x, scores = x.detach(), torch.randn(rows, tokens, device=x.device, dtype=x.dtype)

    def work() -> None:
        torch.mm(x, keys.t())
        torch.mm(scores, values)
        torch.mm(x, values.t())
        torch.mm(scores.t(), x)
        torch.mm(scores.t(), x)
        torch.mm(scores, keys)

    return work


def training_small(scale: Scale, result: Result) -> None:
    """Measure training steps of the small model and of a transformer with as many parameters."""
    _training_steps(scale.small, scale, result)


def training_large(scale: Scale, result: Result) -> None:
    """Measure training steps of the large model and of a transformer with as many parameters."""
    _training_steps(scale.large, scale, result)


def _training_steps(shape: Shape, scale: Scale, result: Result) -> None:
    columns = ["model", "micro-batch", "recomputed", "ms", "tokens/s", "TFLOP/s", "MFU", "of matmul's rate", "peak GiB"]
    row = result.table(
        f"Training steps of the {shape.name} model, bf16 unless fp8, sequence {shape.seq_length}", *columns
    )
    with result.guarded(f"{shape.name} training"):
        state = _state(shape, scale)
        _step_row(state, shape, scale, result=result, row=row)
        _longest_kernels(state, shape, scale=scale, result=result)
        for recompute in ("selective", "full") if not scale.is_quick else ():
            _step_row(state, shape, scale, result=result, row=row, recompute=recompute)
        if not scale.is_quick and scale.device.type == "cuda":
            _largest_micro_batch(state, shape, scale=scale, result=result)
        del state
    for name, layer, precision in (("transformer", "transformer", "bf16"), ("tokenformer fp8", "tokenformer", "fp8")):
        _empty_cache()
        with result.guarded(f"{shape.name} {name}"):
            _step_row(_state(shape, scale, layer, precision=precision), shape, scale, result=result, row=row, name=name)


def _empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _state(shape: Shape, scale: Scale, layer: str = "tokenformer", **training: object) -> TrainState:
    config = step_config(shape, micro_batch=scale.micro_batch, layer=layer, **training)
    return build_state(config, Mesh(scale.device))


def _step_row(
    state: TrainState,
    shape: Shape,
    scale: Scale,
    *,
    result: Result,
    row: Callable[..., None],
    name: str = "tokenformer",
    recompute: str = "none",
) -> None:
    """Time steps of one micro-batch."""
    size = scale.micro_batch
    choose_computation(state.model, state.kernels, recompute)
    batches = [_device_batch(shape, size, step) for step in range(2)]
    turn = iter(range(1 << 30))
    if scale.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        train_step(state, batches[next(turn) % 2], 1e-4)

    time = milliseconds(step, scale.device, turns=max(3, scale.turns // 4), warm_up=2)
    peak = torch.cuda.max_memory_allocated() if scale.device.type == "cuda" else 0
    tokens = size * shape.seq_length
    rate = training_flops(state.model.config, shape.seq_length) * tokens / time / 1e9
    cells = [f"{name}, {parameter_count(state.model.config) / 1e6:,.0f} M", size, recompute, f"{time:.1f}"]
    mfu = rate / peak_rate(scale.device)
    share = rate / result_rate(result)
    row(*cells, f"{1000 * tokens / time:,.0f}", f"{rate:.0f}", f"{mfu:.1%}", f"{share:.1%}", f"{peak / GIB:.1f}")
    if recompute == "none":
        result.figures[f"{shape.name} {name} ms"] = time
        result.figures[f"{shape.name} {name} MFU"] = mfu
        result.figures[f"{shape.name} {name} peak GiB"] = peak / GIB
    choose_computation(state.model, state.kernels, "none")


def peak_rate(device: torch.device) -> float:
    """Return the peak dense 16-bit TFLOP/s of the GPU from its data sheet; NaN if it is unknown."""
    found = flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found / 1e12 if found else float("nan")


def result_rate(result: Result) -> float:
    """Return the TFLOP/s of a large matrix product as measured by `ceilings`."""
    if result.path is None or not (path := result.path.with_name("ceilings.json")).exists():
        return float("nan")
    return read_result(path).figures.get("matmul bfloat16 TFLOP/s", float("nan"))


def _longest_kernels(state: TrainState, shape: Shape, scale: Scale, result: Result) -> None:
    """List the kernels that take the most time in a step."""
    if scale.device.type != "cuda":
        return
    batch = _device_batch(shape, scale.micro_batch, 0)
    row = result.table(f"Kernels of a {shape.name} step that take the most time", "kernel", "launches", "ms")
    times = kernel_times(lambda: train_step(state, batch, 1e-4))
    row("all", sum(count for _, count, _ in times), f"{sum(time for *_, time in times):.1f}")
    for name, count, time in times[:25]:
        row(name[:110].replace("|", "/"), count, f"{time:.2f}")


def _device_batch(shape: Shape, size: int, step: int) -> Batch:
    """Make a batch as the loader does: in page-locked memory for a GPU."""
    batch = random_batch(step_config(shape, micro_batch=size), step)
    return pin(batch) if torch.cuda.is_available() else batch


def _largest_micro_batch(state: TrainState, shape: Shape, scale: Scale, result: Result) -> None:
    """Find the largest micro-batch that fits, predicted from two sizes and then verified."""
    columns = ["recomputed", "independent of size, GiB", "18 bytes per parameter, GiB", "MiB per sample"]
    columns += ["largest that fits", "its peak, GiB"]
    row = result.table(f"Largest micro-batch of the {shape.name} model", *columns)
    total = torch.cuda.get_device_properties(scale.device).total_memory
    for recompute in ("none", "full"):
        peaks = [_peak(state, shape, size=size, recompute=recompute) for size in (2, 4)]
        per_sample = (peaks[1] - peaks[0]) / 2
        rest = peaks[0] - 2 * per_sample
        size = int((0.95 * total - rest) / per_sample)
        while size > 0:
            torch.cuda.empty_cache()
            try:
                peak = _peak(state, shape, size=size, recompute=recompute)
                break
            except torch.OutOfMemoryError:
                state.model.zero_grad(set_to_none=True)
                size = int(size * 0.95)
        else:
            peak = 0.0
        formula = parameter_bytes(state)
        cells = [recompute, f"{rest / GIB:.1f}", f"{formula / GIB:.1f}", f"{per_sample / MIB:,.0f}"]
        row(*cells, size, f"{peak / GIB:.1f} of {total / GIB:.0f}")
    choose_computation(state.model, state.kernels, "none")
    torch.cuda.empty_cache()


def _peak(state: TrainState, shape: Shape, size: int, recompute: str) -> float:
    choose_computation(state.model, state.kernels, recompute)
    batch = _device_batch(shape, size, 0)
    torch.cuda.reset_peak_memory_stats()
    train_step(state, batch, 1e-4)
    return float(torch.cuda.max_memory_allocated())


def graph(scale: Scale, result: Result) -> None:
    """Capture forward and backward of one micro-batch as a CUDA graph."""
    if scale.device.type != "cuda":
        result.skip("CUDA graphs need a GPU")
        return
    config = step_config(scale.small, micro_batch=2)
    state = build_state(config, Mesh(scale.device))
    batch = random_batch(config, 0)
    ids = batch.ids.to(scale.device)
    batches = MicroBatches(ids[..., :-1].contiguous(), ids[..., 1:].contiguous())

    def work() -> None:
        state.runner.train(batches, float(batch.num_targets))

    reason = is_capturable(work)
    result.is_true("forward and backward of a micro-batch as a CUDA graph", not reason, reason or "captured, replayed")


def decoding(scale: Scale, result: Result) -> None:
    """Time the next token of one and of eight texts, against reading the weights once at the rate of a copy."""
    columns = ["model", "texts", "ms per token", "weights read once, ms", "ratio"]
    row = result.table("Decoding in bf16", *columns)
    for texts in (1, 8):
        with result.guarded(f"decoding {texts}"):
            model = _language_model(scale.small, scale.device)
            size = sum(p.nbytes for p in model.parameters())
            generation = Generation(model, [list(range(32))] * texts, Sampling(temperature=0))
            time = milliseconds(generation.step, scale.device, turns=scale.turns)
            buffer = torch.empty(size // 2, device=scale.device, dtype=torch.bfloat16)
            read = milliseconds(buffer.sum, scale.device, turns=scale.turns)
            result.figures[f"decoding {texts} / read"] = time / read
            row(scale.small.name, texts, f"{time:.2f}", f"{read:.2f}", f"{time / read:.1f}")


def _language_model(shape: Shape, device: torch.device) -> LanguageModel:
    config = step_config(shape, micro_batch=1).model
    with torch.device(device):
        transformer = TokenFormer(config, dtype=torch.bfloat16).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0.0, 0.02)
    model = LanguageModel(transformer, RunRecord(model=config, config={}, tau={}, tokenizer={})).eval()
    model.arrange_for_decoding()
    synchronize(device)
    return model
