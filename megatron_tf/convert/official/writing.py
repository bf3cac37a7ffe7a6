"""Writes official weights in the format of torch.save, for models that the official code computes identically."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.checkpoint.contents import held_parameters
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.config import TOKEN_KINDS
from megatron_tf.convert.external import GROUP, check_overflow
from megatron_tf.convert.official.names import OFFICIAL, PUBLISHED
from megatron_tf.tokenformer.parameters import initial_taus

_WRITTEN_AT_THE_END = ("version", ".data/serialization_id")  # written by torch's own writer
_THEIR_KEYS = {
    "rotary_base": "rotary_emb_base",
    "rotary_percent": "rotary_pct",
    "layernorm_epsilon": "layernorm_epsilon",
}
"""Key of our model configuration -> key of the official configuration."""


def check_representable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, with the reason, if the official code would compute different outputs."""
    where = checkpoint.directory
    model = checkpoint.record.model
    if model.layer != "tokenformer":
        raise CheckpointError(f"{where} is a plain transformer, but the official format only supports TokenFormers")
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


def check_confirmed(checkpoint: Checkpoint, given_values: Mapping[str, float | None]) -> None:
    """Raise CheckpointError if the model differs from the published ones in a value that an official file can't store,
    unless the user has confirmed that value: readers of the file must set it to get the same outputs."""
    where = checkpoint.directory
    for key, published in PUBLISHED.items():
        value, given = getattr(checkpoint.record.model, key), given_values[key]
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


def write_official(checkpoint: Checkpoint, path: Path, dtype: torch.dtype) -> None:
    """Write the parameters to `path` in the format of torch.save, rounded to `dtype`, with one in memory at a time.

    Raises CheckpointError, with the reason, if the official code would compute different outputs, or if a value
    overflows `dtype`.
    """
    check_representable(checkpoint)
    num_layers = checkpoint.record.model.num_layers
    parameters = held_parameters(checkpoint, GROUP)
    skeleton = path.with_suffix(".skeleton")  # a sparse file with everything except the bytes of the tensors
    with torch.serialization.skip_data():
        torch.save({OFFICIAL.of(p, num_layers): torch.empty(p.shape, dtype=dtype) for p in parameters}, skeleton)
    whole = torch.empty(max(math.prod(p.shape) for p in parameters), dtype=dtype)  # reused for one tensor after another
    # private API: no public function writes the container incrementally, and torch.save needs all tensors in memory
    with zipfile.ZipFile(skeleton) as records, torch.serialization._open_zipfile_writer(str(path)) as writer:
        for record in records.namelist():
            name = record.partition("/")[2]
            if name.startswith("data/"):
                last = _fill(whole, checkpoint, parameters[int(name.removeprefix("data/"))].name)
                writer.write_record(name, whole.untyped_storage(), records.getinfo(record).file_size)
                # kept until here: if it were freed earlier, the writer's small allocations would fragment memory
                del last
            elif name not in _WRITTEN_AT_THE_END:
                content = records.read(record)
                writer.write_record(name, content, len(content))
    skeleton.unlink()


def _fill(whole: Tensor, checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Read a tensor into the start of `whole`, rounded to its type; return the last block."""
    place, rows = 0, None
    for rows in read_blocks(checkpoint, GROUP, name):
        written = whole[place : place + rows.numel()]
        written.copy_(rows.flatten())
        check_overflow(f"{checkpoint.directory}: {name}", rows.flatten(), written)
        place += rows.numel()
    return rows
