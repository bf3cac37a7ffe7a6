"""The Triton kernels compile for an H100 or H200 without one being there."""

import inspect
from dataclasses import astuple

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_tf.kernels import triton_dropout, triton_loss, triton_programs, triton_rotary  # noqa: E402
from megatron_tf.kernels.triton_kernels import (  # noqa: E402
    BACKWARD_PARTS,
    FORWARD_PARTS,
    LARGEST_HELD_ROW,
    choose_tile,
)

PROGRAMS = {
    "forward_held": FORWARD_PARTS,
    "forward_long": FORWARD_PARTS,
    "statistic_part": FORWARD_PARTS,
    "weights_part": FORWARD_PARTS,
    "backward_held": BACKWARD_PARTS,
    "backward_long": BACKWARD_PARTS,
    "inner_part": BACKWARD_PARTS,
    "gradient_part": BACKWARD_PARTS,
}
TYPES = {"count": "i32", "tau": "*fp32", "factor": "*fp32", "statistic": "*fp32", "inner": "*fp32"}


def compiled_for_sm_90(kernel, constants, wide, element):
    """PTX of a kernel; arguments named in `wide` point to that type, the others to `element`."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {n: "constexpr" if n in constants else f"*{wide.get(n, element)}" for n in names}
    source = ASTSource(kernel, signature, constexprs={n: constants[n] for n in names if n in constants})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", [0, 1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_compiles_for_sm_90(name, norm, element):
    program, tile = getattr(triton_programs, name), choose_tile(3072, PROGRAMS[name])
    names = list(inspect.signature(program.fn).parameters)
    constants = {"n": 3072, "NORM": norm, "ROWS": tile.rows, "BLOCK": tile.block, "PARTS": tile.parts}
    constants = {n: value for n, value in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else TYPES.get(n, f"*{element}") for n in names}
    source = ASTSource(program, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})
    assert ".target sm_90" in compiled.asm["ptx"]


@pytest.mark.parametrize("most_parts", [FORWARD_PARTS, BACKWARD_PARTS])
def test_tiles_cover_rows_with_few_idle_threads(most_parts):
    for n in range(1, LARGEST_HELD_ROW + 1):
        tile = choose_tile(n, most_parts)
        covered = tile.block * tile.parts
        assert n <= covered < n + tile.block
        assert tile.parts <= most_parts
        assert tile.block == 64 or covered <= n * (1 + 2 / most_parts)
        assert tile.rows * tile.block == 256 * tile.warps
        assert 4 <= tile.warps <= 16


@pytest.mark.parametrize(
    "n, forward, backward",
    [
        (576, (8, 128, 5, 4), (4, 256, 3, 4)),
        (1536, (4, 256, 6, 4), (2, 512, 3, 4)),
        (6144, (1, 1024, 6, 4), (1, 2048, 3, 8)),
        (16384, (1, 2048, 8, 8), (1, 4096, 4, 16)),
        (36920, (1, 2048, 19, 8), (1, 4096, 10, 16)),
    ],
)
def test_the_tiles_of_published_models(n, forward, backward):
    assert astuple(choose_tile(n, FORWARD_PARTS)) == forward
    assert astuple(choose_tile(n, BACKWARD_PARTS)) == backward


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["loss_statistics_row", "loss_gradient_block"])
def test_the_loss_compiles_for_sm_90(name, element):
    wide = dict.fromkeys(["log_total", "chosen", "scale"], "fp32") | {"targets": "i64"}
    ptx = compiled_for_sm_90(getattr(triton_loss, name), {"n": 50304, "BLOCK": 4096}, wide, element)
    assert ".target sm_90" in ptx
    assert "spill" not in ptx


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_dropout_compiles_for_sm_90(element, has_residual):
    scalars = {"offset": "i64", "threshold": "i32", "scale": "fp32", "n": "i32"}
    constants = {"HAS_RESIDUAL": has_residual, "BLOCK": 2048}
    names = inspect.signature(triton_dropout.drop_block.fn).parameters
    types = scalars | {"seeds_ptr": "*i64"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{element}") for name in names}
    source = ASTSource(triton_dropout.drop_block, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert ".target sm_90" in compiled.asm["ptx"]


@pytest.mark.parametrize("element", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("is_inverse", [False, True])
def test_rotary_compiles_for_sm_90(element, is_inverse):
    constants = {"WIDTH": 96, "HALF": 48, "IS_INVERSE": is_inverse, "HEADS": 16, "COLUMNS": 64, "REST": 0}
    scalars = {"heads": "i32", "tokens_per_position": "i32"} | dict.fromkeys(constants, "constexpr")
    names = inspect.signature(triton_rotary.rotate_token.fn).parameters
    signature = {name: scalars.get(name, f"*{element}") for name in names}
    source = ASTSource(triton_rotary.rotate_token, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert ".target sm_90" in compiled.asm["ptx"]
