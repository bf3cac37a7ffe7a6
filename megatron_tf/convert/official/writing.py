"""The official implementation's weights: one `pytorch_model.bin` of fp32, bf16 or fp16 tensors, under its names.

It has no moments and no temperatures: its code takes tau from the number of tokens at every call.
"""

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.config import TOKEN_KINDS, ModelConfig
from megatron_tf.convert.external import GROUP, ExternalTensor, in_memory
from megatron_tf.convert.official.zipped import ZippedTensors
from megatron_tf.tokenformer.parameters import Module, Parameter, Role, initial_taus

FILE = "pytorch_model.bin"
EMBEDDING = "sequential.0.word_embeddings.weight"
_MOST_RANKS = 64
_LOADING_ERRORS = (
    UnpicklingError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
)
_WRITTEN_AT_THE_END = ("version", ".data/serialization_id")  # by torch's own writer
_LAYER = re.compile(r"sequential\.([0-9]{1,9})\.(?:attention|mlp)\.")
_NAMES = {
    (Module.EMBEDDING, Role.WEIGHT): EMBEDDING,
    (Module.QUERY, Role.KEYS): "sequential.{block}.attention.query.key_param_tokens",
    (Module.QUERY, Role.VALUES): "sequential.{block}.attention.query.value_param_tokens",
    (Module.KEY, Role.KEYS): "sequential.{block}.attention.key.key_param_tokens",
    (Module.KEY, Role.VALUES): "sequential.{block}.attention.key.value_param_tokens",
    (Module.VALUE, Role.KEYS): "sequential.{block}.attention.value.key_param_tokens",
    (Module.VALUE, Role.VALUES): "sequential.{block}.attention.value.value_param_tokens",
    (Module.PROJ, Role.KEYS): "sequential.{block}.attention.proj.key_param_tokens",
    (Module.PROJ, Role.VALUES): "sequential.{block}.attention.proj.value_param_tokens",
    (Module.FFN, Role.KEYS): "sequential.{block}.mlp.key_param_tokens",
    (Module.FFN, Role.VALUES): "sequential.{block}.mlp.value_param_tokens",
    (Module.FINAL_NORM, Role.WEIGHT): "sequential.{norm}.norm.weight",
    (Module.FINAL_NORM, Role.BIAS): "sequential.{norm}.norm.bias",
    (Module.HEAD, Role.WEIGHT): "sequential.{head}.final_linear.weight",
}
"""They number what runs one after another: embedding, a transposition, the layers, another one, norm, head."""
_MODULE_OF_KIND = {"qkv": Module.QUERY, "proj": Module.PROJ, "ffn": Module.FFN}
"""One module whose tokens are as many as its kind has."""


def official_name(parameter: Parameter, num_layers: int) -> str:
    """Return the official implementation's name of a parameter of ours, in a model of so many layers."""
    return _name_of(parameter.module, parameter.role, num_layers, parameter.layer or 0)


def _name_of(module: Module, role: Role, num_layers: int, layer: int = 0) -> str:
    return _NAMES[module, role].format(block=layer + 2, norm=num_layers + 3, head=num_layers + 4)


def read_official(path: Path) -> dict[str, ExternalTensor]:
    """The tensors of a file under their own names; only what is read of them takes memory, and no code in it runs.

    Raises CheckpointError where it is not a file of tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: name the {FILE} to convert")
    return ZippedTensors(path).tensors() if zipfile.is_zipfile(path) else _read_old(path)


def _read_old(path: Path) -> dict[str, ExternalTensor]:
    """What torch wrote before 1.6, which is loaded whole."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{path} can't be read as tensors alone: {reason[0] if reason else error!r}") from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path} holds more than tensors: {name!r} is {type(value).__name__}")
    return {name: in_memory(value) for name, value in state.items()}


def infer_model(path: Path, tensors: Mapping[str, ExternalTensor], vocab_size: int) -> dict[str, Any]:
    """What the shapes, and the size of the tokenizer, tell of a model's configuration: all but heads and normalisation.

    Raises CheckpointError for tensors that are not those of an official TokenFormer.
    """
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if not layers:
        raise CheckpointError(
            f"{path} is not of an official TokenFormer: it lacks {_name_of(Module.QUERY, Role.KEYS, 0)}"
        )
    num_layers = max(layers) - 1
    if layers != set(range(2, 2 + len(layers))):  # before anything is made for each of what may be a billion layers
        first = next(number for number in range(2, 2 + len(layers)) if number not in layers)
        raise CheckpointError(f"{path} is not of an official TokenFormer: it lacks sequential.{first}")
    shapes = {
        kind: _matrix_shape(path, tensors, _name_of(module, Role.KEYS, num_layers))
        for kind, module in _MODULE_OF_KIND.items()
    }
    rows, hidden_size = _matrix_shape(path, tensors, EMBEDDING)
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": _padding(path, rows, vocab_size),
        **{f"{kind}_tokens": shape[0] for kind, shape in shapes.items()},
        "untie_embeddings_and_output_weights": _name_of(Module.HEAD, Role.WEIGHT, num_layers) in tensors,
    }


def _padding(path: Path, rows: int, vocab_size: int) -> int:
    """A multiple to which `vocab_size` is padded to `rows`: the official code takes 128 times the number of ranks."""
    multiples = [128 * ranks for ranks in range(1, _MOST_RANKS + 1)] + [rows] * (rows - 128 < vocab_size)
    fitting = [multiple for multiple in multiples if -(-vocab_size // multiple) * multiple == rows]
    if not fitting:
        raise CheckpointError(
            f"{path}: {EMBEDDING} has {rows:,} rows, which the tokenizer's {vocab_size:,} ids are not padded to: give "
            f"the tokenizer that the model was trained with"
        )
    return fitting[0]


def without_frequencies(
    path: Path, tensors: Mapping[str, ExternalTensor], model: ModelConfig
) -> dict[str, ExternalTensor]:
    """The tensors but for rotary frequencies, which files of gpt-neox hold as a buffer of each layer.

    Raises CheckpointError where they are others than the model's.
    """
    dim = int(model.head_dim * model.rotary_percent)
    expected = 1.0 / model.rotary_base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept = {}
    for name, tensor in tensors.items():
        if not name.endswith(".rotary_emb.inv_freq"):
            kept[name] = tensor
            continue
        found = tensor.read_rows(0, tensor.shape[0]).float() if tensor.shape else torch.empty(0)
        # of 16 bits, as gpt-neox keeps its buffers under bf16
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=2**-7, atol=0.0):
            raise CheckpointError(
                f"{path}: {name} is not of heads of {model.head_dim}, of which {model.rotary_percent:.0%} turn, and "
                f"base {model.rotary_base:g}: is --num-attention-heads {model.num_attention_heads} right?"
            )
    return kept


def _matrix_shape(path: Path, tensors: Mapping[str, ExternalTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{path} is not of an official TokenFormer: it lacks {name}")
    shape = tensors[name].shape
    if len(shape) != 2:
        raise CheckpointError(f"{path}: {name} is {list(shape)}, expected two dimensions")
    return shape


def check_representable(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise CheckpointError, with the reason, where the official code would compute something else."""
    where = checkpoint.directory
    if model.layer != "tokenformer":
        raise CheckpointError(f"{where} is a plain transformer: the official format is for TokenFormers only")
    for kind in TOKEN_KINDS:
        counts = set(model.token_counts(kind))
        if len(counts) > 1:
            raise CheckpointError(
                f"{where}: layers have {min(counts)} to {max(counts)} {kind} tokens; the official code has one number "
                f"for all layers: --to hf keeps them"
            )
    for module, theirs in initial_taus(model).items():
        tau = checkpoint.record.tau[module]
        if not math.isclose(tau, theirs, rel_tol=1e-9):
            raise CheckpointError(
                f"{where}: {module} has tau {tau:.6g}; the official code takes {theirs:.6g} for its number of tokens "
                f"and computes something else. A model that grew by zero keys can't be represented there: --to hf can"
            )


PUBLISHED = {"rotary_base": 10000.0, "rotary_percent": 0.25, "layernorm_epsilon": 1e-5}
"""What no tensor tells, as the published models have it; by the model's keys."""
_THEIR_KEYS = {
    "rotary_base": "rotary_emb_base",
    "rotary_percent": "rotary_pct",
    "layernorm_epsilon": "layernorm_epsilon",
}


def check_told(where: Path, model: ModelConfig, told: Mapping[str, float | None]) -> None:
    """Raise CheckpointError where the model differs from the published ones in what an official file can't hold, and
    the user has not `told` the same value: whoever reads the file would compute something else."""
    for key, published in PUBLISHED.items():
        value, given = getattr(model, key), told[key]
        if value == (published if given is None else given):
            continue
        option = f"--{key.replace('_', '-')}"
        if given is not None:
            raise CheckpointError(f"{option} is {given:g}, {where} has {value:g}")
        raise CheckpointError(
            f"{where} has {key} {value:g}, which an official file can't hold (published: {published:g}): its "
            f"configuration must say {_THEIR_KEYS[key]} {value:g}, and so must {option} when the file is imported; "
            f"give {option} {value:g} here to confirm that"
        )


def write_official(checkpoint: Checkpoint, model: ModelConfig, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the parameters to `path` as torch.save does, with no more than one of them in memory, rounded to `dtype`.

    Raises CheckpointError, with the reason, where the official code would compute something else, and where a number
    is too large for `dtype`.
    """
    check_representable(checkpoint, model)
    parameters = held_parameters(checkpoint, GROUP)
    skeleton = path.with_suffix(".skeleton")  # a sparse file: everything but the bytes of the tensors
    with torch.serialization.skip_data():
        torch.save(
            {official_name(p, model.num_layers): torch.empty(p.shape, dtype=dtype) for p in parameters}, skeleton
        )
    whole = torch.empty(max(math.prod(p.shape) for p in parameters), dtype=dtype)  # for one after another
    with zipfile.ZipFile(skeleton) as records, torch.serialization._open_zipfile_writer(str(path)) as writer:
        for record in records.namelist():
            name = record.partition("/")[2]
            if name.startswith("data/"):
                last = _fill(whole, checkpoint, parameters[int(name.removeprefix("data/"))].name)
                writer.write_record(name, whole.untyped_storage(), records.getinfo(record).file_size)
                del last  # held till here, or what the writer remembers would split its room, and the heap grow
            elif name not in _WRITTEN_AT_THE_END:
                content = records.read(record)
                writer.write_record(name, content, len(content))
    skeleton.unlink()


def _fill(whole: Tensor, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Read a tensor into the front of `whole`, rounded to its type; returns the last block of it."""
    place, rows = 0, None
    for rows in read_blocks(checkpoint, GROUP, name):
        written = whole[place : place + rows.numel()]
        written.copy_(rows.flatten())
        _check_overflow(checkpoint, name, rows, written)
        place += rows.numel()
    return rows


def _check_overflow(checkpoint: Checkpoint, name: str, rows: Tensor, written: Tensor) -> None:
    """Raise CheckpointError where a finite number became infinite."""
    if written.dtype == rows.dtype or not bool(written.isinf().any()):
        return
    overflowed = rows.flatten()[written.isinf() & rows.flatten().isfinite()]
    if overflowed.numel():
        raise CheckpointError(
            f"{checkpoint.directory}: {name} holds {float(overflowed[0]):g}, which is too large for "
            f"{str(written.dtype).removeprefix('torch.')}: export with --dtype bf16 or fp32"
        )
