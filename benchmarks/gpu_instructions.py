"""Instructions of the Triton kernels between a Pattention's products, without a GPU: benchmarks/gpu_instructions.py

Compiles each kernel for sm_90 and counts the instructions of its disassembly for each element of the scores. A GPU
issues at most one instruction for 128 elements per multiprocessor and clock, and moves the elements at the rate of its
memory: the table compares the two for 16384 rows of 6144 tokens on an H200. Needs triton, which brings the tools.
"""

import argparse
import inspect
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_tf.kernels import triton_programs
from megatron_tf.kernels.triton_kernels import BACKWARD_PARTS, FORWARD_PARTS, choose_tile
from megatron_tf.kernels.triton_programs import GELU_L2_NORM, L2_NORM_GELU, SOFTMAX

ROWS, TOKENS = 16384, 6144
ISSUED = 132 * 128 * 1.755e9  # elements of instructions per second: multiprocessors, lanes, clock
MOVED = 4.2e12  # bytes per second that a copy on an H200 reads and writes
NORMS = {"l2_norm_gelu": L2_NORM_GELU, "gelu_l2_norm": GELU_L2_NORM, "softmax": SOFTMAX}
PASSES = {"forward_held": (FORWARD_PARTS, 2), "backward_held": (BACKWARD_PARTS, 4)}
"""Name of a kernel -> most blocks per row, and elements that it reads and writes for each score."""
FP32 = ("tau", "factor")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s", re.MULTILINE)


def per_element(name: str, norm: int, tokens: int) -> float:
    """Count the instructions of a kernel in bf16 for each element."""
    program, tile = getattr(triton_programs, name), choose_tile(tokens, PASSES[name][0])
    constants = {"n": tokens, "NORM": norm, "ROWS": tile.rows, "BLOCK": tile.block, "PARTS": tile.parts}
    types, aligned = {}, {}
    for i, argument in enumerate(inspect.signature(program.fn).parameters):
        pointer = "*fp32" if argument in FP32 else "*bf16"
        types[argument] = "constexpr" if argument in constants else "i32" if argument == "count" else pointer
        if types[argument] == pointer:
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(program, types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tile.warps})
    return len(INSTRUCTION.findall(disassemble(compiled.asm["cubin"]))) / (
        tile.rows * tile.block * tile.parts / (32 * tile.warps)
    )


def disassemble(cubin: bytes) -> str:
    """Disassemble a kernel with the tool that comes with triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("| kernel | normalization | instructions per element | issued in | moved in |\n|---|---|---|---|---|")
    for name, (_, elements) in PASSES.items():
        for norm, number in NORMS.items():
            instructions = per_element(name, number.value, TOKENS)
            issued = 1000 * ROWS * TOKENS * instructions / ISSUED
            moved = 1000 * ROWS * TOKENS * elements * 2 / MOVED
            print(f"| {name} | {norm} | {instructions:.1f} | {issued:.3f} ms | {moved:.3f} ms |")


if __name__ == "__main__":
    main()
