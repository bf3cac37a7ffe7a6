"""Where the model meets the mesh: which layers and which rows of each parameter this rank holds."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_tf.config import ModelConfig
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.warm_up import warm_up
from megatron_tf.layers.cross_entropy import IGNORE_INDEX, cross_entropy
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.data_parallel import shard_over_replicas
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import LossFunction, MicroBatchShapes, partition_layers
from megatron_tf.parallel.sharding import RowShard, copy_rows, local_tensor, row_shard
from megatron_tf.tokenformer.parameters import Module, key_tokens, model_parameters
from megatron_tf.tokenformer.sizes import head_flops, layer_flops


def stage_layers(config: ModelConfig, num_stages: int, seq_length: int) -> list[range]:
    """The layers of each pipeline stage, balanced by operations; looking up an embedding costs next to nothing."""
    costs = [float(layer_flops(config, layer, seq_length)) for layer in range(config.num_layers)]
    costs[-1] += head_flops(config)  # whichever stage has the last layer has the head
    return partition_layers(costs, num_stages)


def build_stage(
    config: ModelConfig, mesh: Mesh, *, seq_length: int, sequence_parallel: bool, dtype: torch.dtype
) -> TokenFormer:
    """This rank's stage, its parameters placed on the mesh but not yet filled with values."""
    layers = stage_layers(config, mesh.size("pp"), seq_length)[mesh.rank("pp")]
    with torch.device("meta"):  # whole parameters, which need not fit on one rank
        model = TokenFormer(config, layers, group=mesh.group("tp"), sequence_parallel=sequence_parallel, dtype=dtype)
    _place_parameters(model, mesh)
    shard_over_replicas(model, model.layers.values(), mesh)
    return model


def choose_computation(model: TokenFormer, kernels: Kernels, recompute_granularity: str) -> None:
    """How the stage is computed: none of it changes what is computed, beyond rounding."""
    model.use(kernels)
    model.recompute_blocks = recompute_granularity == "full"
    for pattention in model.pattentions().values():
        pattention.recompute_scores = recompute_granularity == "selective"


def warm_up_kernels(model: TokenFormer, mesh: Mesh, *, rows: int, dtype: torch.dtype) -> str | None:
    """Compile what `rows` tokens of a micro-batch need, on one rank of each host first; every rank calls it.

    Returns, on every rank, why one of them can't compile; None where all did.
    """
    projections = model.pattentions()
    first = next(iter(projections.values()), None)
    if first is None or isinstance(first.kernels, EagerKernels):  # which nothing compiles
        return None
    declared = key_tokens(model.config)
    shapes: dict[tuple[int, int], None] = {}  # a set in the order of the layers, the same on every rank of a stage
    for path, projection in projections.items():
        together = 3 if declared[path].kind == "qkv" else 1  # query, key and value run together
        shapes[together * rows, len(local_tensor(projection.key_tokens))] = None
    is_shared = mesh.group("tp") is not None
    return mesh.first_on_host_first(
        lambda: warm_up(first.kernels, first.norm, shapes, dtype=dtype, device=mesh.device, is_shared=is_shared)
    )


def parameter_shards(model: TokenFormer) -> list[RowShard]:
    """The rows this rank holds of every parameter of its stage."""
    declared = model_parameters(model.config)
    shards = []
    for name, parameter in model.named_parameters():
        is_copy = declared[name].module is Module.EMBEDDING and not model.is_first  # tied: the first stage owns it
        shards.append(row_shard(name, parameter, is_copy))
    return shards


def initialize(shards: Iterable[RowShard], config: ModelConfig, seed: int) -> None:
    """Fill this rank's rows of every parameter with its initial values."""
    declared = model_parameters(config)
    for shard in shards:
        copy_rows(shard, declared[shard.name].initial_rows(seed, shard.start, shard.stop))


def micro_batch_shapes(
    config: ModelConfig, mesh: Mesh, *, size: int, seq_length: int, sequence_parallel: bool, dtype: torch.dtype
) -> MicroBatchShapes:
    """Shapes of micro-batches of `size` samples, as they pass between this mesh's stages."""
    ranks = mesh.size("tp")
    return MicroBatchShapes(
        tokens=(size, seq_length),
        hidden=(seq_length // ranks if sequence_parallel else seq_length, size, config.hidden_size),
        output=(seq_length, size, config.padded_vocab_size // ranks),
        dtype=dtype,
    )


def token_loss(mesh: Mesh) -> LossFunction:
    """Make the loss function: the sum over a micro-batch's targets, divided; targets that are ignored add nothing."""
    group = mesh.group("tp")

    def loss(logits: Tensor, targets: Tensor, divisor: float) -> Tensor:
        labels = targets.t().flatten()
        losses = cross_entropy(logits.flatten(0, 1), labels, group).masked_fill(labels == IGNORE_INDEX, 0.0)
        # before backward, where the gradients of a sum of many tokens overflow in fp16
        return losses.sum() / divisor

    return loss


def _place_parameters(model: TokenFormer, mesh: Mesh) -> None:
    declared = model_parameters(model.config)
    for path, module in model.named_modules():
        for role, parameter in list(module.named_parameters(recurse=False)):
            is_sharded = declared[f"{path}.{role}"].is_sharded
            module.register_parameter(role, _place(parameter, is_sharded, mesh))


def _place(parameter: nn.Parameter, is_sharded: bool, mesh: Mesh) -> nn.Parameter:
    tensor_parallel = mesh.submesh("tp")
    if tensor_parallel is None:
        return nn.Parameter(torch.empty_like(parameter, device=mesh.device))
    ranks = tensor_parallel.size()
    placement = Shard(0) if is_sharded else Replicate()
    rows = parameter.shape[0] // ranks if is_sharded else parameter.shape[0]
    local = torch.empty((rows, *parameter.shape[1:]), dtype=parameter.dtype, device=mesh.device)
    # run_check would send what is in the memory, which holds no values yet
    return nn.Parameter(DTensor.from_local(local, tensor_parallel, [placement], run_check=False))
