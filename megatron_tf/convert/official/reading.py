"""Reads official weights: the tensors of a file, and the configuration inferred from their shapes."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.config import ModelConfig, TrainingConfig, parse_config
from megatron_tf.convert.external import (
    ExternalCheckpoint,
    ExternalTensor,
    TokenizerChoice,
    external_record,
    in_memory,
    rename,
)
from megatron_tf.convert.official.names import FILE, OFFICIAL, PUBLISHED
from megatron_tf.convert.official.zipped import ZippedTensors
from megatron_tf.tokenformer.parameters import Module, Role, initial_taus

_EMBEDDING = OFFICIAL.name(Module.EMBEDDING, Role.WEIGHT, num_layers=0)
_MOST_RANKS = 64
_LAYER = re.compile(r"sequential\.([0-9]{1,9})\.(?:attention|mlp)\.")
_MODULE_OF_KIND = {"qkv": Module.QUERY, "proj": Module.PROJ, "ffn": Module.FFN}
"""One module that has as many tokens as its kind."""


def read_official(
    path: Path, tokenizer: TokenizerChoice, *, given: dict[str, Any], seq_length: int
) -> ExternalCheckpoint:
    """Return the model in a file as a checkpoint; `given` are model keys that can't be inferred from the tensors.

    Raises CheckpointError or ConfigError if the file does not contain such a model, or the tokenizer does not match.
    """
    tensors = read_official_tensors(path)
    inferred = _infer_model(path, tensors, tokenizer.identity["vocab_size"])
    model = parse_config(ModelConfig, inferred | PUBLISHED | given, str(path))
    record = external_record(model, tokenizer, tau=initial_taus(model), seq_length=seq_length, seed=TrainingConfig.seed)
    weights = _without_frequencies(path, tensors, model)
    return ExternalCheckpoint(path, rename(path, weights, expected=OFFICIAL.parameters(model)), record)


def read_official_tensors(path: Path) -> dict[str, ExternalTensor]:
    """Open the tensors of a file under their own names, without running any code in it; data is read on demand.

    Raises CheckpointError if it is not a file of tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: name the {FILE} to convert")
    return ZippedTensors(path).tensors() if zipfile.is_zipfile(path) else _read_old(path)


def _read_old(path: Path) -> dict[str, ExternalTensor]:
    """Read the format of torch before 1.6, which has to be loaded as a whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # invalid files raise errors of any kind
        # torch's own message recommends loading without weights_only, which runs what an untrusted file says
        raise CheckpointError(
            f"{path} can't be read as plain tensors: torch.save did not write it, or wrote other objects, too"
        ) from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path} holds more than tensors: {name!r} is {type(value).__name__}")
    return {name: in_memory(value) for name, value in state.items()}


def _infer_model(path: Path, tensors: Mapping[str, ExternalTensor], vocab_size: int) -> dict[str, Any]:
    """Infer the model configuration, except heads and normalization, from tensor shapes and the tokenizer's size.

    Raises CheckpointError if the tensors are not those of an official TokenFormer.
    """
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if not layers:
        missing = OFFICIAL.name(Module.QUERY, Role.KEYS, num_layers=0)
        raise CheckpointError(f"{path} is not an official TokenFormer: it lacks {missing}")
    num_layers = max(layers) - 1
    # before creating anything per layer, since a damaged file may declare a billion
    expected = range(2, 2 + len(layers))
    if layers != set(expected):
        first = next(number for number in expected if number not in layers)
        raise CheckpointError(f"{path} is not an official TokenFormer: it lacks sequential.{first}")
    shapes = {
        kind: _matrix_shape(path, tensors, OFFICIAL.name(module, Role.KEYS, num_layers=num_layers))
        for kind, module in _MODULE_OF_KIND.items()
    }
    rows, hidden_size = _matrix_shape(path, tensors, _EMBEDDING)
    head = OFFICIAL.name(Module.HEAD, Role.WEIGHT, num_layers=num_layers)
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": _padding(path, rows, vocab_size),
        **{f"{kind}_tokens": shape[0] for kind, shape in shapes.items()},
        "untie_embeddings_and_output_weights": head in tensors,
    }


def _padding(path: Path, rows: int, vocab_size: int) -> int:
    """Return a multiple that pads `vocab_size` to `rows`; the official code uses 128 times the number of ranks."""
    multiples = [128 * ranks for ranks in range(1, _MOST_RANKS + 1)] + [rows] * (rows - 128 < vocab_size)
    fitting = [multiple for multiple in multiples if -(-vocab_size // multiple) * multiple == rows]
    if not fitting:
        raise CheckpointError(
            f"{path}: {_EMBEDDING} has {rows:,} rows, which the tokenizer's {vocab_size:,} ids are not padded to: give "
            f"the tokenizer that the model was trained with"
        )
    return fitting[0]


def _without_frequencies(
    path: Path, tensors: Mapping[str, ExternalTensor], model: ModelConfig
) -> dict[str, ExternalTensor]:
    """Remove the rotary frequencies, which gpt-neox stores as a buffer of each layer.

    Raises CheckpointError if they differ from the model's.
    """
    dim = int(model.head_dim * model.rotary_percent)
    expected = 1.0 / model.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept = {}
    for name, tensor in tensors.items():
        if not name.endswith(".rotary_emb.inv_freq"):
            kept[name] = tensor
            continue
        found = tensor.read_rows(0, tensor.shape[0]).float() if tensor.shape else torch.empty(0)
        # 16 bits: gpt-neox also converts its buffers under bf16
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=2**-7, atol=0.0):
            raise CheckpointError(
                f"{path}: {name} is not of heads of {model.head_dim}, of which {model.rotary_percent:.0%} turn, and "
                f"base {model.rotary_base:g}: is --num-attention-heads {model.num_attention_heads} right?"
            )
    return kept


def _matrix_shape(path: Path, tensors: Mapping[str, ExternalTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{path} is not an official TokenFormer: it lacks {name}")
    shape = tensors[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {name} is {list(shape)}, expected two dimensions")
    return shape
