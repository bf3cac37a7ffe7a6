"""Tokens/s and memory of a training step: this model, the published layer without fusion, and a plain transformer.

Twelve layers of width 512 with the same number of parameters in each case; the same micro-batch, the fastest of several
steps, alternating between separate processes: python benchmarks/training_step.py
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

from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.sizes import parameter_count, training_flops
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step

WIDTH, LAYERS, VOCABULARY, SEQ_LENGTH, BATCH = 512, 12, 8192, 512, 4
TOKENS = {"qkv_tokens": WIDTH, "proj_tokens": WIDTH, "ffn_tokens": 4 * WIDTH}
TRUNK = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 8, "vocab_size": VOCABULARY}
MODELS = {
    "tokenformer": TOKENS,
    "published": TOKENS,
    # four linear projections have as many parameters as 2 D tokens; the MLP gets the rest
    "transformer": {"layer": "transformer", "ffn_tokens": 3 * WIDTH + WIDTH + 4 * WIDTH - 2 * WIDTH},
}


def published_pattend(x: Tensor, projections: list, ranks: object = None) -> Tensor:
    """Replace each Pattention by its plain formula under autograd."""
    outputs = []
    for projection in projections:
        scores = x @ projection.key_tokens.to(x.dtype).t()
        weights = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * projection.tau)
        outputs.append(weights @ projection.value_tokens.to(x.dtype))
    return torch.stack(outputs)


def run(name: str, precision: str, recompute: str, kernels: str, *, steps: int) -> None:
    """Print the fastest step, the last loss and the peak memory as JSON, in a separate process."""
    if name == "published":
        from megatron_tf.layers import attention, pattention

        attention.pattend = pattention.pattend = published_pattend
    training = {
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": BATCH,
        "global_batch_size": BATCH,
        "train_iters": 1000,
        "precision": precision,
        "recompute_granularity": recompute,
    }
    values = {
        "model": TRUNK | MODELS[name],
        "training": training,
        "optimizer": {"lr": 1e-3},
        "kernels": {"pattention": kernels},
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
    }
    config = parse_config(RunConfig, values, "benchmark")
    state = build_state(config, Mesh(torch.device("cpu")))
    before = resident_mib("VmRSS")
    best, loss = float("inf"), 0.0
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (1, BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids, torch.arange(BATCH)[None], BATCH * SEQ_LENGTH)
        start = time.perf_counter()
        loss = train_step(state, batch, 1e-3).loss
        best = min(best, time.perf_counter() - start)
    flops = training_flops(config.model, SEQ_LENGTH) * BATCH * SEQ_LENGTH / best
    result = {"seconds": best, "loss": loss, "mib": resident_mib("VmHWM") - before, "flops": flops}
    print(json.dumps(result | {"parameters": parameter_count(config.model)}))


def resident_mib(field: str) -> float:
    """Return `field` of this process's memory status, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def main() -> None:
    """Run each case in a separate process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--run", nargs=4, metavar=("MODEL", "PRECISION", "RECOMPUTE", "KERNELS"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.run:
        run(*args.run, steps=args.steps)
        return
    cases = [(name, precision, "none", "auto") for precision in ("fp32", "bf16") for name in MODELS]
    cases += [("tokenformer", "fp32", kind, "auto") for kind in ("selective", "full")]
    cases += [
        ("tokenformer", precision, "none", kind) for precision in ("fp32", "bf16") for kind in ("eager", "compiled")
    ]
    best: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for _ in range(args.turns):
        for case in cases:
            command = [sys.executable, __file__, "--steps", str(args.steps), "--run", *case]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            best[case] = min(best.get(case, found), found, key=lambda result: result["seconds"])
    print(f"{BATCH} x {SEQ_LENGTH} tokens a step, {torch.get_num_threads()} threads")
    columns = ["model", "precision", "recomputed", "kernels", "parameters", "tokens/s", "against ours", "memory, MiB"]
    columns += ["GFLOP/s", "loss"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (name, precision, recompute, kernels), found in best.items():
        ratio = found["seconds"] / best["tokenformer", precision, "none", "auto"]["seconds"]
        rate = BATCH * SEQ_LENGTH / found["seconds"]
        figures = [f"{found['parameters']:,}", f"{rate:,.0f}", f"{1 / ratio:.2f}", f"{found['mib']:,.0f}"]
        figures += [f"{found['flops'] / 1e9:,.0f}", f"{found['loss']:.3f}"]
        print(f"| {' | '.join([name, precision, recompute, kernels, *figures])} |")


if __name__ == "__main__":
    main()
