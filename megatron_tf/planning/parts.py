"""The parts that a layout is composed of (embedding, a layer, head), each run alone by the trainer's code."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tf.config import RunConfig
from megatron_tf.layers.casting import CastingModule
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.dry_run.fake_world import DEVICE, META_KERNELS, fake_rank
from megatron_tf.training.step.state import TrainState, build_state

PartName = Literal["embedding", "layer", "head"]
PARTS: tuple[PartName, ...] = ("embedding", "layer", "head")
"""In the order of a forward; each has a pipeline rank of its own when it is run alone."""


@dataclass(frozen=True)
class RunnablePart:
    """A part of the model on a rank that is alone, or whose tensor- and context-parallel neighbors do not exist."""

    state: TrainState
    forward: Callable[[], Tensor]
    """Runs one micro-batch. Its input, outside the embedding, is a leaf that wants a gradient."""


@contextmanager
def runnable_part(config: RunConfig, name: PartName, layer: int, *, device: torch.device) -> Iterator[RunnablePart]:
    """Build a part, with `layer`'s numbers of tokens, and yield it; parameters are cast, and have gradients of zero.

    On the meta device its tensors have no values, elsewhere initial ones. torch.distributed must not be initialized.
    """
    alone = _three_of(config, layer, device)
    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    rank = PARTS.index(name) * tensor * context
    with fake_rank(rank, tensor=tensor, pipeline=3, data=1, context=context, device=device) as mesh:
        state = build_state(alone, _without_sharing(mesh))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        yield RunnablePart(state, _forward_of(state, alone, name))


def _without_sharing(mesh: Mesh) -> Mesh:
    """Return the mesh of a rank that shares its parameters with none: the layout tells what FSDP does."""
    assert mesh.device_mesh is not None
    return dataclasses.replace(mesh, flat={"dp_cp": mesh.device_mesh["dp"]}, sharing=mesh.device_mesh["dp"])


def keep_casts(state: TrainState) -> None:
    """Cast every parameter, within `keeping_casts`, as the first micro-batch of a step does."""
    for module in state.model.modules():
        if isinstance(module, CastingModule):
            for role, _ in module.named_parameters(recurse=False):
                module.detached(role, state.model.dtype)


def _three_of(config: RunConfig, layer: int, device: torch.device) -> RunConfig:
    """Return a configuration of three such layers as three pipeline stages, with one micro-batch in a step."""
    model, training = config.model, config.training
    counts: Any = {f"{kind}_tokens": model.token_counts(kind)[layer] for kind in model.token_kinds}
    parallel = config.parallel
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, num_layers=3, **counts),
        training=dataclasses.replace(
            training, global_batch_size=training.micro_batch_size, rampup_batch_size=None, deterministic=False
        ),
        parallel=dataclasses.replace(
            parallel,
            pipeline_model_parallel_size=3,
            num_virtual_stages_per_pipeline_rank=None,
            pipeline_model_parallel_layout=None,
            pipeline_schedule="gpipe",
            data_parallel_size=None,
            data_parallel_shard_size=None,
        ),
        kernels=META_KERNELS if device == DEVICE else config.kernels,
        growth=[],
    )


def _forward_of(state: TrainState, config: RunConfig, name: PartName) -> Callable[[], Tensor]:
    model, training, device = state.model, config.training, state.mesh.device
    length = training.seq_length // config.parallel.context_parallel_size
    ids = torch.zeros(training.micro_batch_size, length, dtype=torch.int64, device=device)
    if name == "embedding":
        return lambda: model.embedding.embed(ids).to(model.dtype)
    if config.parallel.sequence_parallel:
        length //= config.parallel.tensor_model_parallel_size
    x = torch.randn(length, training.micro_batch_size, config.model.hidden_size, dtype=model.dtype, device=device)
    x.requires_grad_()
    return (lambda: model(x)) if name == "layer" else (lambda: model.loss(x, ids, 1.0))
