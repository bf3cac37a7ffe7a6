"""The Triton kernels compile for an H100 or H200 without one being there."""

import inspect

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_tf.kernels import triton_kernels  # noqa: E402

KERNELS = [
    "forward_row",
    "statistic_row",
    "weights_block",
    "backward_row",
    "backward_activation_row",
    "backward_norm_block",
]


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_sm_90(name, norm, element):
    kernel = getattr(triton_kernels, name)
    constants = {"n": 3072, "epsilon": 1e-12, "NORM": norm, "BLOCK": 4096}
    names = list(inspect.signature(kernel.fn).parameters)
    wide = {"tau", "factor", "statistic", "scale", "inner", "share"}
    signature = {n: "constexpr" if n in constants else ("*fp32" if n in wide else f"*{element}") for n in names}
    source = ASTSource(kernel, signature, constexprs={n: constants[n] for n in names if n in constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert ".target sm_90" in compiled.asm["ptx"]
    assert "spill" not in compiled.asm["ptx"]
