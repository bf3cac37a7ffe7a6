"""Adapters of other packages against torch's own: stand-ins computed by torch, under the packages' own signatures.

Those of apex are in no package registry: its stand-ins have the parameters that its documentation names.
"""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_tf.errors import UserError
from megatron_tf.kernels import adapters
from megatron_tf.kernels.dispatch import Kernels, choose_kernels, without_pattention_kernels
from megatron_tf.training.step.adam import adamw, set_adam_state
from tests.support.signatures import KNOWN, as_published, versions_of

CPU = torch.device("cpu")
AUTO = {"pattention": "auto", "attention": "auto", "norm": "auto", "optimizer": "auto"}


def install(monkeypatch, name, **contents):
    """A package called `name` with these contents, for the test."""
    for depth in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:depth])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    for key, value in contents.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def attention_of_batches(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """As flash_attn_func of flash-attn: [B, S, h, d]."""
    assert dropout_p == 0.0
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


class DotProductAttention(torch.nn.Module):
    """As transformer-engine's."""

    def __init__(self, num_attention_heads, kv_channels, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type=""):
        super().__init__()
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "sbhd", "causal")
        self.shape = num_attention_heads, kv_channels

    def forward(self, query_layer, key_layer, value_layer):
        assert query_layer.shape[-2:] == self.shape
        assert query_layer.is_contiguous()
        batches = (t.transpose(0, 1) for t in (query_layer, key_layer, value_layer))
        return attention_of_batches(*batches, causal=True).transpose(0, 1).flatten(-2)


class LayerNorm(torch.nn.Module):
    """As transformer-engine's."""

    def __init__(self, normalized_shape, eps=1e-5, device="cuda", params_dtype=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, device=device, dtype=params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(normalized_shape, device=device, dtype=params_dtype))
        self.eps = eps

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, self.eps)


class FusedAdam(torch.optim.Optimizer):
    """As apex's and transformer-engine's: the step is the group's, the Adam moments are the parameters'."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, **_):
        assert bias_correction
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                p.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denominator, value=-lr / (1 - beta1**step))


def qkv():
    torch.manual_seed(0)
    return [torch.randn(7, 2, 3, 4, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("package, version", versions_of("flash_attn", "flash_attn_4", "transformer_engine"))
def test_attention_equals_torch(monkeypatch, package, version):
    signatures = KNOWN[package][version]
    if package == "transformer_engine":
        kind = as_published(signatures, "DotProductAttention", DotProductAttention)
        install(monkeypatch, "transformer_engine.pytorch", DotProductAttention=kind)
        attend = adapters.transformer_engine_attention()
    else:
        is_new = package == "flash_attn_4"
        both = lambda **options: (attention_of_batches(**options), torch.zeros(1))  # noqa: E731
        function = as_published(signatures, "flash_attn_func", both if is_new else attention_of_batches)
        install(monkeypatch, "flash_attn.cute" if is_new else "flash_attn", flash_attn_func=function)
        attend = adapters.flash_attention(version_4=is_new)
    inputs, dy = qkv(), torch.randn(7, 2, 3, 4)
    expected, found = adapters.sdpa(*inputs), attend(*inputs)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("package, version", [("apex", None), *versions_of("transformer_engine")])
def test_norms_equal_torch(monkeypatch, package, version):
    if package == "apex":
        install(
            monkeypatch,
            "apex.normalization.fused_layer_norm",
            fused_layer_norm=lambda input, normalized_shape, eps=1e-6: F.layer_norm(input, normalized_shape, eps=eps),
            fused_layer_norm_affine=lambda input, weight, bias, normalized_shape, eps=1e-6: F.layer_norm(
                input, normalized_shape, weight, bias, eps
            ),
        )
        normalize = adapters.apex_norm()
    else:
        kind = as_published(KNOWN[package][version], "LayerNorm", LayerNorm)
        install(monkeypatch, "transformer_engine.pytorch", LayerNorm=kind)
        normalize = adapters.transformer_engine_norm()
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 8), (8,), (8,)))
    torch.testing.assert_close(normalize(x, None, None, epsilon=1e-3), adapters.torch_norm(x, None, None, epsilon=1e-3))
    found, expected = (f(x, weight, bias, epsilon=1e-3) for f in (normalize, adapters.torch_norm))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("package, version", [("apex", None), *versions_of("transformer_engine")])
def test_optimizers_equal_torch_and_resume_from_any_step(monkeypatch, package, version):
    module = {"apex": "apex.optimizers", "transformer_engine": "transformer_engine.pytorch.optimizers"}[package]
    kind = FusedAdam if version is None else as_published(KNOWN[package][version], "FusedAdam", FusedAdam)
    install(monkeypatch, module, FusedAdam=kind)
    torch.manual_seed(0)
    start, gradients = torch.randn(6), torch.randn(4, 6)
    moments = torch.randn(6), torch.rand(6)
    found = {}
    for choice in ("torch", package):
        p = start.clone()
        adam = adamw(choice, [{"params": [p], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        state = {"exp_avg": moments[0].clone(), "exp_avg_sq": moments[1].clone()}
        set_adam_state(adam, {p: state}, [7])
        for gradient in gradients:
            p.grad = gradient.clone()
            adam.step()
        found[choice] = p, state["exp_avg"], state["exp_avg_sq"]
    for one, other in zip(found["torch"], found[package], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({"attention": "flash_attn"}, r"flash_attn: it is not installed: pip install '.\[gpu\]'"),
        (
            {"attention": "transformer_engine"},
            r"n=transformer_engine: it is not installed: pip install '.\[gpu\]'",
        ),
        ({"norm": "apex"}, r"norm=apex: it is not installed: build it from its sources"),
        ({"optimizer": "transformer_engine"}, r"optimizer=transformer_engine: it is not installed"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_how_to_get_it(requested, message):
    with pytest.raises(UserError, match=message):
        choose_kernels(AUTO | requested, CPU, torch.float32)


def test_auto_says_what_it_took():
    assert (
        choose_kernels(AUTO, CPU, torch.float32).taken
        == "pattention native, attention sdpa, norm torch, optimizer torch"
    )
    assert (
        choose_kernels(AUTO | {"norm": "torch"}, CPU, torch.bfloat16).taken
        == "pattention native, attention sdpa, optimizer torch"
    )


BROKEN = {
    "ImportError": "/lib/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E",
    "RuntimeError": "built for another version of CUDA",
    "AttributeError": "module 'torch' has no attribute 'gone'",
    "OSError": "libcudart.so.12: cannot open shared object file",
}


@pytest.fixture
def break_package(tmp_path, monkeypatch):
    """Puts packages on sys.path that raise an error when they are imported, and claims a GPU."""

    def break_it(package, kind):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise {kind}({BROKEN[kind]!r} + '\\nmore lines')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    return break_it


@pytest.mark.parametrize("kind", BROKEN)
def test_auto_takes_torchs_own_where_a_package_is_broken_and_says_why(break_package, kind):
    break_package("flash_attn", kind)
    kernels = choose_kernels(AUTO, torch.device("cuda"), torch.bfloat16)
    assert kernels.attend is adapters.sdpa
    assert kernels.automatic["attention"] == "sdpa"
    assert kernels.warning.startswith("kernels.attention=flash_attn: it is installed but can't be imported with torch ")
    assert f"{kind}: {BROKEN[kind]}: reinstall it" in kernels.warning
    assert kernels.warning.endswith("auto falls back to sdpa")
    assert "\n" not in kernels.warning


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "key, package",
    [
        ("attention", "flash_attn"),
        ("attention", "transformer_engine"),
        ("norm", "apex"),
        ("norm", "transformer_engine"),
        ("optimizer", "apex"),
        ("optimizer", "transformer_engine"),
    ],
)
def test_a_choice_of_a_broken_package_is_one_line(break_package, key, package, kind):
    break_package(package, kind)
    with pytest.raises(UserError) as caught:
        choose_kernels(AUTO | {key: package}, torch.device("cuda"), torch.bfloat16)
    assert str(caught.value).startswith(f"kernels.{key}={package}: it is installed but can't be imported with torch ")
    assert f"{kind}: {BROKEN[kind]}: reinstall it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_reasons_to_fall_back_are_told():
    first = replace(Kernels(), automatic={"pattention": "triton"}, warning="attention is broken")
    warning = without_pattention_kernels(first, "no compiler").warning
    assert warning == "attention is broken; kernels.pattention: no compiler; auto falls back to eager"
