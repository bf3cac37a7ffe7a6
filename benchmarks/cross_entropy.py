"""Time and peak memory of the head with its loss, forward and backward: fused in chunks, against torch's operators.

Memory in addition to hidden states and weight, each case in a separate process: python benchmarks/cross_entropy.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels.loss import EagerLoss
from megatron_tf.layers.cross_entropy import head_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(kind: str, precision: str, shape: tuple[int, int, int]) -> None:
    """Print CPU seconds, and MiB in addition to the inputs, as JSON; `shape` is (tokens, width, vocabulary)."""
    tokens, width, vocabulary = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(DTYPES[precision]).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident_mib("VmRSS"), time.process_time()
    loss = fused_loss(hidden, weight, targets) if kind == "ours" else plain_loss(hidden, weight, targets)
    loss.backward()
    # of the processor, which other programs on the machine change less than the clock's
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "mib": resident_mib("VmHWM") - before, "loss": float(loss)}))


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss as a training step computes it."""
    return head_loss(hidden, weight, targets, divisor=len(hidden), group=None, kernels=EagerLoss())


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss from stored logits, in fp32 as torch's operator needs for precision."""
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), targets)


def resident_mib(field: str) -> float:
    """Return `field` of this process's memory status, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def main() -> None:
    """Run each case in a separate process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--run", nargs=2, metavar=("KIND", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run, (args.tokens, args.width, args.vocabulary))
        return
    print(f"{args.tokens} tokens, width {args.width}, {args.vocabulary} ids, {torch.get_num_threads()} threads")
    print("| loss | precision | all logits, MiB | memory, MiB | CPU seconds | loss |\n|---|---|---|---|---|---|")
    for precision, dtype in DTYPES.items():
        for kind in ("ours", "torch"):
            command = [sys.executable, *sys.argv, "--run", kind, precision]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            size = args.tokens * args.vocabulary * dtype.itemsize / 2**20
            figures = [f"{size:,.0f}", f"{found['mib']:,.0f}", f"{found['seconds']:.1f}", f"{found['loss']:.4f}"]
            print(f"| {' | '.join([kind, precision, *figures])} |", flush=True)


if __name__ == "__main__":
    main()
