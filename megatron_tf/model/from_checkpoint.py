"""Read the whole model of any checkpoint, stored or transformed, onto one device or the ranks of a group."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.collectives import group_rank, group_size
from megatron_tf.parallel.sharding import split_rows
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


def read_transformer(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
) -> TokenFormer:
    """Read the model with parameters and activations of `dtype`; each rank of `group` reads only its own rows.

    Raises CheckpointError if a tensor has another shape than the record says, and UserError if the model can't be split
    evenly over the ranks.
    """
    config = checkpoint.record.model
    config.check_tensor_parallel(group_size(group))
    with torch.device("meta"):
        transformer = TokenFormer(config, group=group, dtype=dtype)

    def rows(parameter: Parameter) -> Tensor:
        return _read_own_rows(checkpoint, parameter, group).to(device, dtype)

    fill(transformer, rows, checkpoint.record.tau)
    return transformer


def fill(transformer: TokenFormer, rows: Callable[[Parameter], Tensor], tau: Mapping[str, float]) -> None:
    """Replace every parameter, since those on the meta device have no memory, and set each temperature."""
    declared = model_parameters(transformer.config)
    for path, module in transformer.named_modules():
        for role, _ in list(module.named_parameters(recurse=False)):
            module.register_parameter(role, nn.Parameter(rows(declared[f"{path}.{role}"])))
    for path, pattention in transformer.pattentions().items():
        pattention.tau = tau[path]


def _read_own_rows(checkpoint: Checkpoint, parameter: Parameter, group: ProcessGroup | None) -> Tensor:
    name, rows = parameter.name, parameter.shape[0]
    found = checkpoint.shape("model", name)
    if found != parameter.shape:
        raise CheckpointError(f"{checkpoint.directory}: {name} is {list(found)}, its model has {list(parameter.shape)}")
    start, stop = 0, rows
    if parameter.is_sharded:
        start, stop = split_rows(rows, group_size(group), group_rank(group))
    return checkpoint.read_rows("model", name, start=start, stop=stop)
