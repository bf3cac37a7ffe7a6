"""The tensors of a Hugging Face directory: safetensors under the names of the model's code there, in files of bounded
size with an index; streamed both ways."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.files import file_size, read_bounded
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.checkpoint.shard_files import PieceSpec, ShardFileReader, ShardFileWriter
from megatron_tf.convert.external import GROUP, ExternalTensor, parameter_bytes
from megatron_tf.tokenformer.parameters import Module, Parameter, Role

SHARD_BYTES = 5 * 10**9
"""Files are no larger than this, or a single tensor."""
MOST_JSON_BYTES = 1 << 26
"""A configuration, or an index, has no more."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {
    (Module.EMBEDDING, Role.WEIGHT): "model.embed_tokens.weight",
    (Module.FINAL_NORM, Role.WEIGHT): "model.norm.weight",
    (Module.FINAL_NORM, Role.BIAS): "model.norm.bias",
    (Module.HEAD, Role.WEIGHT): "lm_head.weight",
}
"""Outside the layers, whose parameters the code of the export names as we do."""


def huggingface_name(parameter: Parameter) -> str:
    """Return the name of a parameter of ours in the exported model."""
    return _NAMES.get((parameter.module, parameter.role), f"model.{parameter.name}")


def write_tensors(checkpoint: Checkpoint, directory: Path, bar: Any) -> None:
    """Write the parameters into `directory` in blocks of rows, telling `bar` the bytes."""
    shards = _shards(checkpoint)
    index: dict[str, str] = {}
    for number, parameters in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [_spec(checkpoint, parameter) for parameter in parameters]
        with ShardFileWriter(directory / file, specs, {"format": "pt"}) as writer:
            for parameter in parameters:
                index[huggingface_name(parameter)] = file
                for rows in read_blocks(checkpoint, GROUP, parameter.name):
                    writer.write(rows)
                    bar.update(rows.nbytes)
    if len(shards) > 1:
        content = {"metadata": {"total_size": parameter_bytes(checkpoint)}, "weight_map": index}
        (directory / _INDEX).write_text(json.dumps(content, indent=2) + "\n")


def read_tensors(directory: Path) -> dict[str, ExternalTensor]:
    """The tensors of a directory under their own names. Raises CheckpointError naming the file that is not as it
    should be."""
    return {
        name: _external(reader, reader.whole(name))
        for reader in map(_open, _files(directory))
        for name in reader.names()
    }


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
    return PieceSpec(huggingface_name(parameter), dtype, parameter.shape, start=0, stop=parameter.shape[0])


def _open(path: Path) -> ShardFileReader:
    file_size(path)  # a FIFO would wait for its other end
    return ShardFileReader(path)


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
            raise CheckpointError(f"{index} names {file!r}, which is no file beside it")
    return [directory / file for file in files]


def _external(reader: ShardFileReader, spec: PieceSpec) -> ExternalTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=spec.dtype)
        reader.read(spec, start, rows)
        return rows

    return ExternalTensor(spec.shape, spec.dtype, read_rows)
