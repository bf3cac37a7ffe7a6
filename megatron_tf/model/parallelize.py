"""Place the model on the mesh: which layers, and which rows of each parameter, this rank holds."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from megatron_tf.config import ModelConfig, ParallelConfig
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.warm_up import warm_up, warm_up_loss
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.pattention_autograd import BackwardSplit
from megatron_tf.layers.token_chunks import TokenOrder
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.context import Context
from megatron_tf.parallel.data_parallel import shard_over_replicas
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.pipeline import MicroBatchShapes
from megatron_tf.parallel.schedules import SCHEDULES
from megatron_tf.parallel.sharding import RowShard, copy_rows, place_on, row_shard
from megatron_tf.parallel.stages import consecutive_ranges, partition_layers, stages_of_rank
from megatron_tf.tokenformer.dtypes import wide_dtype
from megatron_tf.tokenformer.parameters import Module, key_tokens, model_parameters
from megatron_tf.tokenformer.sizes import head_flops, layer_flops


def stage_layers(config: ModelConfig, num_stages: int, seq_length: int) -> list[range]:
    """Assign layers to pipeline stages, balanced by FLOPs; the embedding lookup counts as free."""
    costs = [float(layer_flops(config, layer, seq_length)) for layer in range(config.num_layers)]
    costs[-1] += head_flops(config)  # the head is on the stage of the last layer
    return partition_layers(costs, num_stages)


def layers_of_stages(config: ModelConfig, parallel: ParallelConfig, seq_length: int) -> list[range]:
    """Return the layers of every pipeline stage: those that `parallel` gives, otherwise balanced by FLOPs."""
    given = parallel.pipeline_model_parallel_layout
    return consecutive_ranges(given) if given else stage_layers(config, parallel.num_stages, seq_length)


def build_stages(
    config: ModelConfig, parallel: ParallelConfig, mesh: Mesh, *, seq_length: int, dtype: torch.dtype
) -> list[TokenFormer]:
    """Build this rank's stages for activations of `dtype`, with parameters placed on the mesh but not initialized.

    Parameters are in fp64 for fp64, otherwise in fp32. The stages are in the order of the model.
    """
    layers = layers_of_stages(config, parallel, seq_length)
    mine = stages_of_rank(
        mesh.rank("pp"),
        ranks=mesh.size("pp"),
        per_rank=parallel.stages_per_rank,
        is_v=SCHEDULES[parallel.pipeline_schedule].is_v,
    )
    return [_build_stage(config, layers[stage], parallel=parallel, mesh=mesh, dtype=dtype) for stage in mine]


def _build_stage(
    config: ModelConfig, layers: range, parallel: ParallelConfig, mesh: Mesh, *, dtype: torch.dtype
) -> TokenFormer:
    sequence_parallel, reshard = parallel.sequence_parallel, parallel.reshard_after_forward
    context = Context(mesh.group("cp"), parallel.context_parallel_method)
    with torch.device("meta"):  # the whole parameters may not fit on one rank
        model = TokenFormer(
            config, layers, group=mesh.group("tp"), context=context, sequence_parallel=sequence_parallel, dtype=dtype
        )
    for pattention in model.pattentions().values():
        pattention.message_chunks = parallel.tp_comm_overlap_chunks
    _place_parameters(model, mesh)
    shard_over_replicas(model, model.layers.values(), mesh, dtype=dtype, reshard_after_forward=reshard)
    return model


def choose_computation(
    model: TokenFormer, kernels: Kernels, recompute_granularity: str, *, splits_backward: bool = False
) -> None:
    """Set the kernels, the activation checkpointing and the split of backward of the stage.

    None of them changes results beyond rounding. A run that recomputes activations lacks memory, so it keeps less
    between the halves of a split backward.
    """
    model.use(kernels)
    model.recompute_blocks = recompute_granularity == "full"
    split: BackwardSplit = "2:2" if recompute_granularity == "none" else "3:1"
    for pattention in model.pattentions().values():
        pattention.recompute_scores = recompute_granularity == "selective"
        pattention.backward_split = split if splits_backward else None


def pattentions(stages: Iterable[TokenFormer]) -> dict[str, Pattention]:
    """Return every Pattention of the stages by module name."""
    return {name: module for stage in stages for name, module in stage.pattentions().items()}


def product_sizes(config: ModelConfig, parallel: ParallelConfig, mesh: Mesh, rows: int) -> Iterator[tuple[str, int]]:
    """Yield every size of a Pattention's products for `rows` tokens, as (what it is, how many)."""
    yield "tokens of a micro-batch", rows
    parts = mesh.size("tp") if parallel.sequence_parallel else 1
    chunks = TokenOrder(parts, rows // parts, parallel.tp_comm_overlap_chunks).chunks()
    for chunk in chunks if len(chunks) > 1 else ():
        yield "tokens of a chunk", chunk.rows.stop - chunk.rows.start
    yield "model.hidden_size", config.hidden_size
    for keys in key_tokens(config).values():
        yield f"{keys.kind} tokens of a rank", keys.shape[0] // mesh.size("tp")


def warm_up_kernels(model: TokenFormer, mesh: Mesh, *, rows: int, dtype: torch.dtype) -> str | None:
    """Compile the kernels for micro-batches of `rows` tokens, on one rank of each host first. Collective.

    Returns, on every rank, the first reason why a rank can't compile, or None if all of them did.
    """
    projections = model.pattentions()
    first = next(iter(projections.values()), None)
    if first is not None and isinstance(first.kernels, EagerKernels):  # nothing to compile
        return None
    declared = key_tokens(model.config)
    shapes: dict[tuple[int, int], None] = {}  # an ordered set: the same order on every rank of a stage
    for path, projection in projections.items():
        together = 3 if declared[path].kind == "qkv" else 1  # query, key and value run together
        shapes[together * rows, projection.key_tokens.shape[0]] = None
    is_shared = mesh.group("tp") is not None

    def run() -> str | None:
        failure = None
        if first is not None:
            failure = warm_up(first.kernels, first.norm, shapes, dtype=dtype, device=mesh.device, is_shared=is_shared)
        if failure is None and model.is_last:
            num_ids = model.config.padded_vocab_size // mesh.size("tp")
            failure = warm_up_loss(model.output_weight.loss_kernels, num_ids, dtype=dtype, device=mesh.device)
        return failure

    return mesh.first_on_host_first(run)


def parameters_of(stages: Iterable[TokenFormer]) -> list[nn.Parameter]:
    """Return the parameters of the stages, in the order of `parameter_shards`."""
    return [parameter for stage in stages for parameter in stage.parameters()]


def parameter_shards(*stages: TokenFormer, mesh: Mesh) -> list[RowShard]:
    """Return the rows that this rank holds of every parameter of its stages."""
    declared, place = model_parameters(stages[0].config), place_on(mesh)
    shards = []
    for stage in stages:
        for name, parameter in stage.named_parameters():
            known = declared[name]
            is_copy = known.module is Module.EMBEDDING and not stage.is_first  # tied: the first stage owns it
            shard = row_shard(name, parameter, known.shape, is_sharded=known.is_sharded, place=place, is_copy=is_copy)
            shards.append(shard)
    return shards


def initialize(shards: Iterable[RowShard], config: ModelConfig, seed: int) -> None:
    """Fill this rank's rows of every parameter with its initial values, which fp64 parameters widen exactly."""
    declared = model_parameters(config)
    for shard in shards:
        if shard.tensor.is_meta:  # a dry run: it has no values
            continue
        copy_rows(shard, declared[shard.name].initial_rows(seed, shard.start, shard.stop))


def micro_batch_shapes(
    config: ModelConfig, mesh: Mesh, *, size: int, seq_length: int, sequence_parallel: bool, dtype: torch.dtype
) -> MicroBatchShapes:
    """Return the shapes of micro-batches of `size` samples as they pass between the stages of this mesh."""
    tokens = seq_length // mesh.size("cp")
    return MicroBatchShapes(
        tokens=(size, tokens),
        hidden=(tokens // mesh.size("tp") if sequence_parallel else tokens, size, config.hidden_size),
        dtype=dtype,
    )


def _place_parameters(model: TokenFormer, mesh: Mesh) -> None:
    declared = model_parameters(model.config)
    for path, module in model.named_modules():
        for role, parameter in list(module.named_parameters(recurse=False)):
            is_sharded = declared[f"{path}.{role}"].is_sharded
            placed = _place(parameter, mesh, is_sharded=is_sharded, dtype=wide_dtype(model.dtype))
            module.register_parameter(role, placed)


def _place(parameter: nn.Parameter, mesh: Mesh, *, is_sharded: bool, dtype: torch.dtype) -> nn.Parameter:
    rows = parameter.shape[0] // (mesh.size("tp") if is_sharded else 1)
    return nn.Parameter(torch.empty((rows, *parameter.shape[1:]), device=mesh.device, dtype=dtype))
