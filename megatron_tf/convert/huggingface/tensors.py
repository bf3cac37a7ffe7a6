"""Reads and writes the tensors of a Hugging Face directory in a streaming way: safetensors files of bounded size with
an index, under the names used by the exported model code or by transformers' own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.files import file_size, read_bounded
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks, rows_per_block
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileReader, ShardFileWriter
from megatron_tf.config import ModelConfig
from megatron_tf.convert.external import GROUP, ExternalTensor, check_overflow, parameter_bytes
from megatron_tf.convert.names import NameTable
from megatron_tf.tokenformer.parameters import Module, Parameter, Role

SHARD_BYTES = 5 * 10**9
"""Maximum size of a file, unless a single tensor is larger."""
MOST_JSON_BYTES = 1 << 26
"""Maximum size of a configuration or an index."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AS_OURS = (Module.QUERY, Module.KEY, Module.VALUE, Module.PROJ, Module.FFN)
HUGGINGFACE = NameTable(
    paths={
        Module.EMBEDDING: "model.embed_tokens",
        **{module: f"model.layers.{{layer}}.{module}" for module in _AS_OURS},
        Module.FINAL_NORM: "model.norm",
        Module.HEAD: "lm_head",
    },
    roles={role: role.value for role in Role},
)
"""Names in the template's code, whose layers use the same names as ours."""
_PLAIN = NameTable(
    paths={
        Module.EMBEDDING: "model.embed_tokens",
        Module.ATTENTION_NORM: "model.layers.{layer}.input_layernorm",
        Module.QUERY: "model.layers.{layer}.self_attn.q_proj",
        Module.KEY: "model.layers.{layer}.self_attn.k_proj",
        Module.VALUE: "model.layers.{layer}.self_attn.v_proj",
        Module.PROJ: "model.layers.{layer}.self_attn.o_proj",
        Module.QUERY_NORM: "model.layers.{layer}.self_attn.q_norm",
        Module.KEY_NORM: "model.layers.{layer}.self_attn.k_norm",
        Module.FFN_NORM: "model.layers.{layer}.post_attention_layernorm",
        Module.FFN_GATE: "model.layers.{layer}.mlp.gate_proj",
        Module.FFN_UP: "model.layers.{layer}.mlp.up_proj",
        Module.FFN_DOWN: "model.layers.{layer}.mlp.down_proj",
        Module.FINAL_NORM: "model.norm",
        Module.HEAD: "lm_head",
    },
    roles={Role.WEIGHT: "weight"},
)
"""Names of Llama and Qwen3 in transformers."""


def write_tensors(checkpoint: Checkpoint, directory: Path, progress: Callable[[int], object]) -> None:
    """Write the parameters in fp32 to `directory` in blocks of rows; `progress` is called with the bytes of each block.

    Raises CheckpointError if a value of an fp64 checkpoint is too large for fp32.
    """
    shards = _shards(checkpoint)
    index: dict[str, str] = {}  # their name -> file
    for number, parameters in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [_spec(parameter, checkpoint.record.model) for parameter in parameters]
        index |= {spec.name: file for spec in specs}
        with ShardFileWriter(directory / file, specs, {"format": "pt"}) as writer:
            for parameter in parameters:
                for rows in _blocks(checkpoint, parameter):
                    written = rows.to(torch.float32)
                    check_overflow(f"{checkpoint.directory}: {parameter.name}", rows, written)
                    writer.write(written)
                    progress(written.nbytes)
    if len(shards) > 1:
        content = {"metadata": {"total_size": parameter_bytes(checkpoint)}, "weight_map": index}
        (directory / _INDEX).write_text(json.dumps(content, indent=2) + "\n")


def read_huggingface_tensors(directory: Path) -> dict[str, ExternalTensor]:
    """Return the tensors of a directory under their own names. Raises CheckpointError naming the file at fault."""
    tensors: dict[str, ExternalTensor] = {}
    for path in _files(directory):
        file_size(path)  # rejects a FIFO, which would block
        reader = ShardFileReader(path)
        tensors |= {name: _external(reader, reader.whole(name)) for name in reader.names()}
    return tensors


def _shards(checkpoint: Checkpoint) -> list[list[Parameter]]:
    """Split the parameters into files, in order."""
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in held_parameters(checkpoint, GROUP):
        nbytes = _spec(parameter, checkpoint.record.model).nbytes
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += nbytes
    return shards


def _spec(parameter: Parameter, model: ModelConfig) -> PieceSpec:
    table = _PLAIN if model.layer == "transformer" else HUGGINGFACE
    shape = parameter.shape[::-1] if parameter.is_transposed else parameter.shape
    return PieceSpec(table.of(parameter, model.num_layers), torch.float32, shape, start=0, stop=shape[0])


def _blocks(checkpoint: Checkpoint, parameter: Parameter) -> Iterator[Tensor]:
    """Yield the rows of a tensor as transformers stores them."""
    blocks = read_blocks(checkpoint, GROUP, parameter.name)
    if not parameter.is_transposed:
        yield from blocks
        return
    whole = torch.cat(list(blocks)).t()  # a row of theirs is a column of ours
    yield from whole.split(rows_per_block(tuple(whole.shape), whole.dtype))


def _files(directory: Path) -> list[Path]:
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    index = directory / _INDEX
    if not index.exists():
        raise CheckpointError(f"{directory} holds no weights: neither {_SINGLE} nor {_INDEX} is in it")
    try:
        files = sorted(set(json.loads(read_bounded(index, MOST_JSON_BYTES))["weight_map"].values()))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (directory / file).is_file():
            raise CheckpointError(f"{index} names {file!r}, which is not a file next to it")
    return [directory / file for file in files]


def _external(reader: ShardFileReader, spec: PieceSpec) -> ExternalTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        reader.read(spec, start, rows)
        return rows

    return ExternalTensor(spec.shape, spec.dtype, read_rows)
