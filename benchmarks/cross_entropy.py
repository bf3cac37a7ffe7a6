"""Peak memory of the loss over a large vocabulary: ours in chunks against torch's cross_entropy, forward and backward.

Memory beyond the logits [T, V] themselves, in processes of their own: python benchmarks/cross_entropy.py
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_tf.layers.cross_entropy import cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(kind: str, precision: str, tokens: int, vocabulary: int) -> None:
    """Print seconds and MiB beyond the logits as JSON."""
    logits = torch.empty(tokens, vocabulary, dtype=DTYPES[precision]).normal_().requires_grad_()
    inside = logits * 1  # as a layer's output, which nothing else needs
    targets = torch.randint(vocabulary, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = resident_mib("VmRSS"), time.perf_counter()
    losses = (
        cross_entropy(inside, targets, None)
        if kind == "ours"
        else F.cross_entropy(inside.float(), targets, reduction="none")
    )
    loss = losses.mean()
    (gradient,) = torch.autograd.grad(loss, inside)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {"seconds": seconds, "mib": resident_mib("VmHWM") - before, "loss": float(loss), "rows": len(gradient)}
        )
    )


def resident_mib(field: str) -> float:
    """Memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--run", nargs=2, metavar=("KIND", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run, args.tokens, args.vocabulary)
        return
    print(f"{args.tokens} tokens, {args.vocabulary} ids")
    print("| loss | precision | logits, MiB | beyond them, MiB | seconds |\n|---|---|---|---|---|")
    for precision, dtype in DTYPES.items():
        for kind in ("ours", "torch"):
            command = [sys.executable, *sys.argv, "--run", kind, precision]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            size = args.tokens * args.vocabulary * dtype.itemsize / 2**20
            print(f"| {kind} | {precision} | {size:,.0f} | {found['mib']:,.0f} | {found['seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
