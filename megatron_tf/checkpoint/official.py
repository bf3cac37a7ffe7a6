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

from megatron_tf.checkpoint.derived import Checkpoint, read_blocks
from megatron_tf.checkpoint.foreign import GROUP, ForeignTensor, in_memory
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.zipped import ZippedTensors
from megatron_tf.config import TOKEN_KINDS, ModelConfig
from megatron_tf.kernels.normalisation import NORMALISATIONS

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


def official_name(name: str, num_layers: int) -> str:
    """The name the official implementation gives to our parameter `name` of a model of so many layers."""
    first, *rest = name.split(".")
    if first == "embedding":
        return EMBEDDING
    if first == "layers":
        module = "mlp" if rest[1] == "ffn" else ".".join(rest[1:-1])
        return f"sequential.{int(rest[0]) + 2}.{module}.{rest[-1].replace('_tokens', '_param_tokens')}"
    if first == "final_norm":
        return f"sequential.{num_layers + 3}.norm.{rest[0]}"
    assert name == "head.weight", name
    return f"sequential.{num_layers + 4}.final_linear.weight"


def read_official(path: Path) -> dict[str, ForeignTensor]:
    """The tensors of a file under their own names; only what is read of them takes memory, and no code in it runs.

    Raises CheckpointError where it is not a file of tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: name the {FILE} to convert")
    return ZippedTensors(path).tensors() if zipfile.is_zipfile(path) else _read_old(path)


def _read_old(path: Path) -> dict[str, ForeignTensor]:
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


def infer_model(path: Path, tensors: Mapping[str, ForeignTensor], vocab_size: int) -> dict[str, Any]:
    """What the shapes, and the size of the tokenizer, tell of a model's configuration: all but heads and normalisation.

    Raises CheckpointError for tensors that are not those of an official TokenFormer.
    """
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    if not layers:
        raise CheckpointError(f"{path} is not of an official TokenFormer: it lacks {official_name(_KIND['qkv'], 0)}")
    num_layers = max(layers) - 1
    if layers != set(range(2, 2 + len(layers))):  # before anything is made for each of what may be a billion layers
        first = next(number for number in range(2, 2 + len(layers)) if number not in layers)
        raise CheckpointError(f"{path} is not of an official TokenFormer: it lacks sequential.{first}")
    shapes = {kind: _matrix_shape(path, tensors, official_name(name, num_layers)) for kind, name in _KIND.items()}
    rows, hidden_size = _matrix_shape(path, tensors, EMBEDDING)
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": _padding(path, rows, vocab_size),
        **{f"{kind}_tokens": shape[0] for kind, shape in shapes.items()},
        "untie_embeddings_and_output_weights": official_name("head.weight", num_layers) in tensors,
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
    path: Path, tensors: Mapping[str, ForeignTensor], model: ModelConfig
) -> dict[str, ForeignTensor]:
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


def birth_tau(model: ModelConfig) -> dict[str, float]:
    """The temperatures that the official code takes, by module."""
    norm = NORMALISATIONS[model.norm_activation]
    return {
        f"layers.{i}.{module}": norm.tau_at_birth(model.token_counts(kind)[i])
        for i in range(model.num_layers)
        for module, kind in _MODULES.items()
    }


_MODULES = {
    **{f"attention.{part}": "qkv" for part in ("query", "key", "value")},
    "attention.proj": "proj",
    "ffn": "ffn",
}
_KIND = {
    "qkv": "layers.0.attention.query.key_tokens",
    "proj": "layers.0.attention.proj.key_tokens",
    "ffn": "layers.0.ffn.key_tokens",
}


def _matrix_shape(path: Path, tensors: Mapping[str, ForeignTensor], name: str) -> tuple[int, ...]:
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
    for module, theirs in birth_tau(model).items():
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
    names = checkpoint.names(GROUP)
    skeleton = path.with_suffix(".skeleton")  # a sparse file: everything but the bytes of the tensors
    with torch.serialization.skip_data():
        shapes = {official_name(name, model.num_layers): checkpoint.shape(GROUP, name) for name in names}
        torch.save({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}, skeleton)
    whole = torch.empty(max(map(math.prod, shapes.values())), dtype=dtype)  # for one after another
    with zipfile.ZipFile(skeleton) as records, torch.serialization._open_zipfile_writer(str(path)) as writer:
        for record in records.namelist():
            name = record.partition("/")[2]
            if name.startswith("data/"):
                last = _fill(whole, checkpoint, names[int(name.removeprefix("data/"))])
                writer.write_record(name, whole.untyped_storage(), records.getinfo(record).file_size)
                del last  # held till here, or what the writer remembers would split its room, and the heap grow
            elif name not in _WRITTEN_AT_THE_END:
                content = records.read(record)
                writer.write_record(name, content, len(content))
    skeleton.unlink()


def _fill(whole: Tensor, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Read a tensor into the front of `whole`, rounded to its type; returns the last block of it."""
    place, rows = 0, None
    for rows in read_blocks(checkpoint, GROUP, name, 0, checkpoint.shape(GROUP, name)[0]):
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
