"""What a run that is resumed has other than the run that saved its checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.record import Identity, RunRecord
from megatron_tf.config import DATA_CONTENT, RunConfig, to_dict
from megatron_tf.data.build import parse_data_path
from megatron_tf.training.run.identity import flatten

_NOT_COMPARED = ("checkpoint.save", "checkpoint.load", "checkpoint.finetune", "checkpoint.allow_changes", "growth")
_DATA_KEYS = ("training.seq_length", "training.seed", "data.split", "data.data_path", "data.order")
_LENGTH_KEYS = ("training.train_iters", "training.global_batch_size", "training.rampup_batch_size")


def check_changes(config: RunConfig, *, data: Sequence[Identity], record: RunRecord, source: Path) -> str:
    """A line that lists each key whose value differs from the one in the checkpoint `source`; empty where none does.

    `config` is the one of the checkpoint's stage of growth, `data` the identities of its training sets. Raises
    CheckpointError where the checkpoint is beyond the run's last step, and where the data read or the learning rate
    would silently become another, unless `checkpoint.allow_changes` names the key.
    """
    step, train_iters = record.training.step, config.training.train_iters
    if step > train_iters:
        raise CheckpointError(
            f"{source} is at step {step} of training.train_iters ({train_iters}): raise train_iters, or choose another "
            f"checkpoint.save"
        )
    saved, now = flatten(record.config), flatten(to_dict(config))
    read = record.details.data
    changed = {
        key: f"{key} {saved[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in saved and saved[key] != value and key not in _NOT_COMPARED and not key.startswith("model.")
    }
    is_same_data = read is None or not all(read) or list(read) == list(data)
    has_read = record.training.samples > 0  # a converted checkpoint has no position in any data
    refused = _refused(saved, now, changed) if saved and has_read else []
    if "data.data_path" in refused and is_same_data and not _moves(saved, now):
        refused.remove("data.data_path")
    if has_read and not is_same_data and "data.data_path" not in changed:
        changed[DATA_CONTENT] = f"{DATA_CONTENT}: the files of data.data_path are not those that were read before"
        refused.append(DATA_CONTENT)
    refused = [key for key in refused if key not in config.checkpoint.allow_changes]
    if refused:
        raise CheckpointError(
            f"{source} was saved with other values: {'; '.join(changed[key] for key in refused)}. Its position in the "
            f"data or its schedule would mean something else: set them back, or name them, "
            f"checkpoint.allow_changes: [{', '.join(refused)}]"
        )
    return f"changed since {source}: {'; '.join(changed.values())}" if changed else ""


def _refused(saved: Mapping[str, Any], now: Mapping[str, Any], changed: Mapping[str, str]) -> list[str]:
    keys = [*_DATA_KEYS]
    if "megatron" in (saved.get("data.order"), now["data.order"]):
        keys += _LENGTH_KEYS  # its shuffle is one of all epochs of the run
    elif _depends_on_length(saved) and _depends_on_length(now):
        keys.append("training.train_iters")
    return [key for key in keys if key in changed]


def _depends_on_length(values: Mapping[str, Any]) -> bool:
    """Whether the learning rate at a step follows from train_iters. A converted checkpoint has no schedule."""
    has_end = any(values.get(f"optimizer.{key}") is not None for key in ("lr_decay_iters", "lr_decay_tokens"))
    style = values.get("optimizer.lr_decay_style", "constant")
    is_level = style == "constant" and not values.get("optimizer.lr_warmup_fraction")
    return not (has_end or is_level)


def _moves(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the order of samples becomes another: it follows from the sets' names and weights, not their folders."""
    old_weights, old = parse_data_path(saved["data.data_path"])
    weights, new = parse_data_path(now["data.data_path"])
    return old_weights != weights or [Path(prefix).name for prefix in old] != [Path(prefix).name for prefix in new]
