"""An optimizer step with four generations of rows, against one in which all rows share one count of updates.

Both optimizers have the same parameters and alternate in this process, so that other load affects both alike; the
figure is the ratio of the medians. Run on an idle machine: python benchmarks/optimizer_generations.py
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.config import OptimizerConfig, load_config
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import Parameter, model_parameters
from megatron_tf.training.step.optimizer import Optimizer

CONFIGURATION = Path(__file__).resolve().parents[1] / "examples/configs/tokenformer_150m.yaml"
GENERATIONS = 4
WARM_UP, TURNS = 3, 30


def main() -> None:
    """Print the times of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGURATION, help="the run whose model has these rows")
    declared = model_parameters(load_config(parser.parse_args().config).model)
    runs = {name: split_rows(parameter) for name, parameter in declared.items()}
    optimizers = [make_optimizer(declared), make_optimizer(declared)]
    optimizers[1].generations = Generations.of_runs(runs)
    gradients = [torch.randn_like(shard.tensor) for shard in optimizers[0].shards]
    turns = [[seconds(optimizer, gradients) for optimizer in optimizers] for _ in range(WARM_UP + TURNS)]
    one, four = (statistics.median(times) for times in zip(*turns[WARM_UP:], strict=True))
    slices = sum(map(len, (group["params"] for group in optimizers[1].adam.param_groups)))
    count = sum(shard.tensor.numel() for shard in optimizers[0].shards)
    print(f"{count:,} parameters in {len(declared)} tensors and {slices} slices, {torch.get_num_threads()} threads")
    print(f"one generation {1e3 * one:.2f} ms, {GENERATIONS} generations {1e3 * four:.2f} ms: {four / one:.3f} of it")


def split_rows(parameter: Parameter) -> list[Run]:
    """Split the rows of parameter tokens into equal parts, one for each generation."""
    rows = parameter.shape[0]
    if parameter.layer is None:
        return [Run(rows, Generation())]
    base = Generation(rewarmup_iters=1000, step_scale=0.5)
    return [Run(rows // GENERATIONS, replace(base, growth=number)) for number in range(GENERATIONS)]


def make_optimizer(declared: dict[str, Parameter]) -> Optimizer:
    """Build an optimizer of random parameters."""
    parameters = [nn.Parameter(torch.randn(parameter.shape)) for parameter in declared.values()]
    shards = []
    for parameter, values in zip(declared.values(), parameters, strict=True):
        rows = parameter.shape[0]
        shard = RowShard(
            name=parameter.name,
            global_shape=parameter.shape,
            start=0,
            stop=rows,
            tensor=values.detach(),
            is_writer=True,
        )
        shards.append(shard)
    return Optimizer(
        parameters=parameters,
        shards=shards,
        declared=declared,
        config=OptimizerConfig(lr=1e-4),
        mesh=Mesh(torch.device("cpu")),
    )


def seconds(optimizer: Optimizer, gradients: list[torch.Tensor]) -> float:
    """Measure one step, in seconds."""
    for parameter, gradient in zip(optimizer.parameters, gradients, strict=True):
        parameter.grad = gradient
    start = time.perf_counter()
    optimizer.step(1e-4)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
