"""The contribution of each parameter token or hidden unit to a model's outputs, measured on samples of a text."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from megatron_tf.layers.linear import MLP
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.tokenformer import TokenFormer

T = TypeVar("T")
_MOST_AT_ONCE = 8  # samples, each of which needs memory for its activations


def unit_contributions(transformer: TokenFormer, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return, by module path, the norm of what each unit adds to the module's output over all positions of samples.

    A parameter token adds P_j V_j, a hidden unit gelu(u_j) w_j. Samples are ids [S]; each result is float64 [N].
    """
    squares: dict[str, Tensor] = {}
    for found in observe_modules(transformer, samples, _squared_weights):
        for path, used in found.items():
            squares[path] = squares[path] + used if path in squares else used
    units = modules_with_units(transformer)
    return {path: (used * _squared_values(units[path])).sqrt() for path, used in squares.items()}


def observe_modules(
    transformer: TokenFormer, samples: Sequence[Tensor], observe: Callable[[str, nn.Module, Tensor], T]
) -> Iterator[dict[str, T]]:
    """Yield, for each sample (ids [S]) in order, what `observe` returns for each path of a module with units,
    the module and its input.

    Several samples run at the same time, each on one thread, so that no bit depends on the number of threads.
    """
    of_thread = threading.local()

    def record(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        of_thread.found[path] = observe(path, module, inputs[0])

    @torch.no_grad()
    def run(ids: Tensor) -> dict[str, T]:
        found: dict[str, T] = {}
        of_thread.found = found
        transformer.hidden_states(ids[None].to(transformer.embedding.weight.device))
        return found

    units = modules_with_units(transformer)
    handles = [module.register_forward_pre_hook(partial(record, path)) for path, module in units.items()]
    try:
        with _one_thread_each(), ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
            yield from pool.map(run, samples)
    finally:
        for handle in handles:
            handle.remove()


def modules_with_units(transformer: TokenFormer) -> dict[str, Pattention | MLP]:
    """Return every Pattention and MLP by module path."""
    return {path: module for path, module in transformer.named_modules() if isinstance(module, (Pattention, MLP))}


@contextmanager
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _squared_weights(path: str, module: nn.Module, x: Tensor) -> Tensor:
    """Sum the squared weight of each unit over the positions of x [..., D]: float64 [N], on the CPU."""
    assert isinstance(module, (Pattention, MLP))
    return module.weights(x).flatten(0, -2).square().sum(0, dtype=torch.float64).cpu()


def _squared_values(module: nn.Module) -> Tensor:
    """Return the squared norm of each value, or row of the down projection: float64 [N], on the CPU."""
    values = module.value_tokens if isinstance(module, Pattention) else module.down.weight  # type: ignore[union-attr]
    assert isinstance(values, Tensor)
    return values.detach().double().square().sum(1).cpu()
