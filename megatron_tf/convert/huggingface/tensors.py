"""The tensors of a Hugging Face directory: safetensors under the names of the model's code there, in files of bounded
size with an index; streamed both ways."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.files import file_size, read_bounded
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileReader, ShardFileWriter
from megatron_tf.convert.external import GROUP, ExternalTensor, parameter_bytes
from megatron_tf.convert.names import NameTable
from megatron_tf.tokenformer.parameters import Module, Parameter, Role

SHARD_BYTES = 5 * 10**9
"""Files are no larger than this, or a single tensor."""
MOST_JSON_BYTES = 1 << 26
"""A configuration, or an index, has no more."""
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
"""Names in the code of the template, which calls what is in its layers as we do."""


def write_tensors(checkpoint: Checkpoint, directory: Path, progress: Callable[[int], object]) -> None:
    """Write the parameters into `directory` in blocks of rows; `progress` takes the bytes of each."""
    shards = _shards(checkpoint)
    index: dict[str, str] = {}  # their name -> file
    for number, parameters in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [_spec(checkpoint, parameter) for parameter in parameters]
        index |= {spec.name: file for spec in specs}
        with ShardFileWriter(directory / file, specs, {"format": "pt"}) as writer:
            for parameter in parameters:
                for rows in read_blocks(checkpoint, GROUP, parameter.name):
                    writer.write(rows)
                    progress(rows.nbytes)
    if len(shards) > 1:
        content = {"metadata": {"total_size": parameter_bytes(checkpoint)}, "weight_map": index}
        (directory / _INDEX).write_text(json.dumps(content, indent=2) + "\n")


def read_huggingface_tensors(directory: Path) -> dict[str, ExternalTensor]:
    """Return the tensors of a directory under their own names. Raises CheckpointError naming the file at fault."""
    tensors: dict[str, ExternalTensor] = {}
    for path in _files(directory):
        file_size(path)  # refuses a FIFO, which would wait for its other end
        reader = ShardFileReader(path)
        tensors |= {name: _external(reader, reader.whole(name)) for name in reader.names()}
    return tensors


def _shards(checkpoint: Checkpoint) -> list[list[Parameter]]:
    """Our parameters in their order, cut into files."""
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in held_parameters(checkpoint, GROUP):
        nbytes = _spec(checkpoint, parameter).nbytes
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += nbytes
    return shards


def _spec(checkpoint: Checkpoint, parameter: Parameter) -> PieceSpec:
    dtype = checkpoint.dtype(GROUP, parameter.name)
    name = HUGGINGFACE.of(parameter, checkpoint.record.model.num_layers)
    return PieceSpec(name, dtype, parameter.shape, start=0, stop=parameter.shape[0])


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
            raise CheckpointError(f"{index} names {file!r}, which is no file next to it")
    return [directory / file for file in files]


def _external(reader: ShardFileReader, spec: PieceSpec) -> ExternalTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        reader.read(spec, start, rows)
        return rows

    return ExternalTensor(spec.shape, spec.dtype, read_rows)
