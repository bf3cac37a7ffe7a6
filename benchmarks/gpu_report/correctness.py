"""Check the arithmetic on this device: golden fixtures, kernels and models against float64, loss curves."""

import copy
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_report.result import Result
from benchmarks.gpu_report.runs import loss_curve, small_config
from benchmarks.gpu_report.scale import Scale
from megatron_tf.config import OptimizerConfig
from megatron_tf.kernels.compiled import CompiledKernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.normalization import EPSILON, NORMALIZATIONS
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.optimizer import Optimizer
from tests.support.golden import CASES, fixture_name, golden_model

CURVE_STEPS = 30


def golden(scale: Scale, result: Result) -> None:
    """Check logits, gradients and five optimizer steps against what the official implementation computed."""
    for case in CASES:
        with result.guarded(f"golden {case}"):
            model, tensors, facts = golden_model(case)
            model, tensors = model.to(scale.device), {name: t.to(scale.device) for name, t in tensors.items()}
            logits = model(tensors["input_ids"]).transpose(0, 1)
            result.at_most(
                f"{case}: logits, largest error", float((logits - tensors["logits"]).detach().abs().max()), 5e-5
            )
            loss = F.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten())
            loss.backward()
            result.at_most(f"{case}: loss, error", abs(loss.item() - facts["loss"]), 2e-6)
            worst = max(
                relative_error(parameter.grad, tensors[f"grad/{fixture_name(model, name)}"])
                for name, parameter in model.named_parameters()
            )
            result.at_most(f"{case}: gradients, largest relative error", worst, 5e-5)
    with result.guarded("golden five Adam steps"):
        _five_adam_steps(scale, result)


def _five_adam_steps(scale: Scale, result: Result) -> None:
    model, tensors, facts = golden_model("A_adam5")
    model, tensors = model.to(scale.device), {name: t.to(scale.device) for name, t in tensors.items()}
    optimizer = Optimizer(
        parameters=list(model.parameters()),
        shards=parameter_shards(model, mesh=Mesh(scale.device)),
        declared=model_parameters(model.config),
        config=OptimizerConfig(lr=facts["optimizer"]["lr"]),
        mesh=Mesh(scale.device),
    )
    inputs, labels = tensors["tokens"][:, :-1], tensors["tokens"][:, 1:]
    worst = 0.0
    for expected in facts["losses_before_each_step"]:
        loss = F.cross_entropy(model(inputs).transpose(0, 1).flatten(0, 1), labels.flatten())
        loss.backward()
        worst = max(worst, abs(loss.item() - expected))
        optimizer.step(facts["optimizer"]["lr"])
    result.at_most("five Adam steps: loss, largest error", worst, 2e-5)


def kernels(scale: Scale, result: Result) -> None:
    """Check every implementation of a Pattention's normalization against autograd in float64."""
    for kernels in _implementations(scale):
        # inductor takes seconds for each shape
        lengths = scale.lengths[1:2] if isinstance(kernels, CompiledKernels) else scale.lengths
        for norm in NORMALIZATIONS:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{kernels.name} {norm} {str(dtype).removeprefix('torch.')}"
                with result.guarded(name):
                    errors = [
                        _kernel_error(kernels, norm, length, size=size, dtype=dtype, device=scale.device)
                        for length in lengths
                        for size in (1.0, 1e2, 1e4)
                    ]
                    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
                    result.at_most(f"{name}: largest relative error / its limit", max(errors) / limit, 1.0)


def _implementations(scale: Scale) -> list[PattentionKernels]:
    """All of them; of a quick report on a GPU those that `auto` selects, as inductor takes long."""
    kernels: list[PattentionKernels] = [EagerKernels(), CompiledKernels()]
    if scale.device.type == "cuda" and importlib.util.find_spec("triton"):
        from megatron_tf.kernels.triton_kernels import TritonKernels

        kernels = [TritonKernels()] if scale.is_quick else [*kernels, TritonKernels()]
    return kernels


def _kernel_error(
    kernels: PattentionKernels, norm_name: str, length: int, *, size: float, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the largest relative error of weights and gradient, on one rank and with rows sharded over ranks."""
    generator = torch.Generator(device).manual_seed(length)
    rows = 64 if length <= 8192 else 4
    scores = (size * torch.randn(rows, length, device=device, generator=generator)).to(dtype)
    grad = torch.randn(rows, length, device=device, generator=generator).to(dtype)
    norm = NORMALIZATIONS[norm_name]
    taus = torch.full((rows,), norm.initial_tau(length), device=device)
    weights, d_scores, floor = _in_float64(norm_name, scores, tau=taus[0].item(), grad=grad)
    # softmax keeps its factor as a logarithm in fp32, whose spacing grows with the scores
    slack = 1.0 + (size / 10 if norm_name == "softmax" and dtype == torch.float32 else 0.0)
    worst = 0.0
    for reduce in (None, lambda values: values * 1):
        factor, found = kernels.forward(norm, scores, tau=taus, reduce=reduce)
        again, found_grad = kernels.backward(norm, scores, factor=factor, grad=grad.clone(), tau=taus, reduce=reduce)
        errors = [
            relative_error(found, weights),
            relative_error(again, weights),
            relative_error(found_grad, d_scores, floor=floor),
        ]
        # max() would drop a NaN that is not the first
        worst = max([worst, *(float("inf") if error != error else error for error in errors)])
    return worst / slack


def _in_float64(norm_name: str, scores: Tensor, tau: float, grad: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return weights, gradient of the scores, and the magnitude of the terms that the gradient subtracts."""
    wide = scores.double().requires_grad_()
    if norm_name == "softmax":
        weights = tau * torch.softmax(wide, -1)
        terms = weights * grad
    else:
        activated = wide if norm_name == "l2_norm_gelu" else F.gelu(wide)
        factor = tau / (activated.square().sum(-1, keepdim=True) + EPSILON).sqrt()
        weights = F.gelu(wide * factor) if norm_name == "l2_norm_gelu" else activated * factor
        terms = factor * grad
    weights.backward(grad.double())
    return weights.detach(), wide.grad, float(torch.linalg.vector_norm(terms.detach()))


def models(scale: Scale, result: Result) -> None:
    """Check a small model's logits and gradients in each precision against float64 on a CPU."""
    for precision, limit in ((torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        for with_documents in (False, True):
            name = f"{str(precision).removeprefix('torch.')}{', within documents' if with_documents else ''}"
            with result.guarded(name):
                logits, gradients = _model_errors(precision, with_documents, scale)
                result.at_most(f"model in {name}: logits, relative error", logits, limit)
                result.at_most(f"model in {name}: gradients, relative error", gradients, 2 * limit)


def _model_errors(dtype: torch.dtype, with_documents: bool, scale: Scale) -> tuple[float, float]:
    config = small_config().model
    reference = TokenFormer(config, dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model = copy.deepcopy(reference).float().to(scale.device)
    model.dtype = dtype
    ids = torch.randint(config.vocab_size, (2, 64), generator=generator)
    starts, lengths = torch.tensor([0] * 20 + [20] * 44).expand(2, -1), torch.tensor([[20, 44]] * 2)
    found = []
    for each, device in ((reference, torch.device("cpu")), (model, scale.device)):
        documents = {"document_starts": starts.to(device), "document_lengths": lengths} if with_documents else {}
        logits = each(ids.to(device), **documents)
        F.cross_entropy(logits.flatten(0, 1).double(), ids.t().flatten().to(device)).backward()
        gradients = torch.cat([p.grad.flatten().cpu().double() for p in each.parameters()])
        found.append((logits.detach().cpu().double(), gradients))
    (logits, gradients), (found_logits, found_gradients) = found
    return relative_error(found_logits, logits), relative_error(found_gradients, gradients)


def losses(scale: Scale, result: Result) -> None:
    """Train a small model in each precision: the loss curve must follow that of fp32 on a CPU."""
    steps = CURVE_STEPS
    reference = loss_curve(small_config(), Mesh(torch.device("cpu")), steps)
    result.is_true("fp32 on a CPU: the loss falls", reference[-1] < reference[0] - 0.5, f"to {reference[-1]:.3f}")
    for precision, limit in (("fp32", 1e-3), ("fp16", 2e-2), ("bf16", 1e-1), ("fp8", 3e-1)):
        with result.guarded(f"loss curve in {precision}"):
            # a dynamic scale would skip the first steps
            scaling = {"loss_scale": {"loss_scale": 1024.0}} if precision == "fp16" else {}
            config = small_config(training={"precision": precision}, **scaling)
            curve = loss_curve(config, Mesh(scale.device), steps)
            worst = max(abs(a - b) for a, b in zip(curve, reference, strict=True))
            result.at_most(f"{steps} losses in {precision}, largest difference from fp32 on a CPU", worst, limit)
    for recompute in ("selective", "full"):
        with result.guarded(f"recompute {recompute}"):
            config = small_config(training={"recompute_granularity": recompute})
            worst = max(
                abs(a - b) for a, b in zip(loss_curve(config, Mesh(scale.device), steps), reference, strict=True)
            )
            result.at_most(f"{steps} losses, {recompute} recomputation, largest difference", worst, 1e-3)


def relative_error(found: Tensor | None, expected: Tensor, *, floor: float = 0.0) -> float:
    """|found - expected| / |expected|, in float64; infinite where there is nothing to compare."""
    if found is None:
        return float("inf")
    expected = expected.double()
    size = max(float(torch.linalg.vector_norm(expected)), floor)
    return float(torch.linalg.vector_norm(found.double() - expected)) / max(size, 1e-30)
