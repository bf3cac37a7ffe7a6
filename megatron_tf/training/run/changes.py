"""Compare the configuration and data of a resumed run with those of the run that saved its checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.contents import stored_dtype
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import Identity
from megatron_tf.config import ANY_DATA, DATA_CONTENT, RunConfig, parse_data_path, to_dict
from megatron_tf.data.content import describe_difference
from megatron_tf.kernels.dropout import GENERATOR
from megatron_tf.tokenformer.dtypes import parameter_dtype
from megatron_tf.training.run.identity import flatten
from megatron_tf.training.run.resumable import OLDEST_ORDER

_NOT_COMPARED = (
    "checkpoint.save",
    "checkpoint.load",
    "checkpoint.finetune",
    "checkpoint.allow_changes",
    "growth",
    "data.phases",
)
_DATA_KEYS = ("training.seq_length", "training.seed", "data.split", "data.data_path", "data.order", "data.packing")
_BATCH_KEYS = ("training.global_batch_size", "training.rampup_batch_size")
_ANY_DATA_KEYS = {*_DATA_KEYS, *_BATCH_KEYS, DATA_CONTENT}
_IN_OLDER_VERSIONS = {"data.order": OLDEST_ORDER, "data.packing": "concatenate"}


def check_changes(config: RunConfig, *, data: Sequence[Identity], record: RunRecord, source: Path) -> str:
    """Return a line that lists each key whose value differs from that in the checkpoint `source`; empty if none does.

    `config` is that of the checkpoint's growth stage, `data` the identities of its training sets. Raises
    CheckpointError if the checkpoint is beyond the run's last step, or if the order of the data or the learning rate
    would change silently, unless `checkpoint.allow_changes` names the key.
    """
    step, train_iters = record.training.step, config.training.train_iters
    if step > train_iters:
        raise CheckpointError(
            f"{source} is at step {step} of training.train_iters ({train_iters}): raise train_iters, or choose another "
            f"checkpoint.save"
        )
    saved, now = _saved_values(record), flatten(to_dict(config))
    changed = {
        key: f"{key} {saved[key]!r} -> {value!r}"
        for key, value in now.items()
        if key in saved and saved[key] != value and key not in _NOT_COMPARED and not key.startswith("model.")
    }
    moving = _moving(
        saved, now, changed=changed, content=_content_changes(saved, now, read=record.details.data, data=data)
    )
    # a converted checkpoint has no position in any data
    moving = moving if record.training.samples > 0 else []
    refused = [key for key in moving if not _is_allowed(key, config.checkpoint.allow_changes)]
    if refused:
        raise CheckpointError(
            f"{source} was saved with other values: {'; '.join(changed[key] for key in refused)}. Its position in the "
            f"data or its schedule would mean something else: set them back, or, if the change is intended, set "
            f"checkpoint.allow_changes: [{', '.join(_names(refused))}]"
        )
    if not changed:
        return ""
    line = f"changed since {source}: {'; '.join(changed.values())}"
    if _ANY_DATA_KEYS.isdisjoint(moving):
        return line
    if saved.get("data.order") == now["data.order"] == "lanes":
        return (
            f"{line}; every set continues where it was left, or at its next epoch if its seed, split or documents "
            f"differ"
        )
    return f"{line}; tokens of the current epoch may be read again or left out"


def warn_of_dropout(config: RunConfig, record: RunRecord, source: Path) -> str:
    """Say that other elements are dropped than before, as the version that saved `source` had another generator of
    masks; empty where nothing was dropped before or is from here on."""
    saved = record.config["training"]
    keys = [key for key in ("hidden_dropout", "attention_dropout") if saved.get(key) and getattr(config.training, key)]
    if not keys or record.details.dropout == GENERATOR:
        return ""
    return (
        f"{source} was saved by a version that drew the masks of {' and '.join(keys)} with another generator: from "
        f"here on other elements are dropped, at the same rates"
    )


def warn_of_rounding(config: RunConfig, record: RunRecord, source: Path) -> str:
    """Say that the fp64 tensors of `source` lose digits in a run of another precision; empty where none does."""
    if stored_dtype(record).itemsize <= parameter_dtype(config.training.precision).itemsize:
        return ""
    return f"{source} is in fp64: training.precision={config.training.precision} rounds its tensors to fp32"


def _saved_values(record: RunRecord) -> dict[str, Any]:
    """Return the run's configuration by "section.key", with the default of keys that an older version did not have."""
    values = flatten(record.config)
    return {**_IN_OLDER_VERSIONS, **values} if "data.data_path" in values else values


def _moving(saved: Mapping[str, Any], now: Mapping[str, Any], changed: dict[str, str], content: str) -> list[str]:
    """Return the keys whose change alters the order of the data or the learning rate, and describe in `changed` how
    the `content` of the data files changed."""
    keys = [key for key in _DATA_KEYS if key in changed]
    if "data.data_path" in changed and content:
        changed["data.data_path"] += f", and {content}"
    elif content:
        changed[DATA_CONTENT] = f"{DATA_CONTENT}: {content}"
        keys.append(DATA_CONTENT)
    elif "data.data_path" in changed and not _has_other_sets(saved, now):
        keys.remove("data.data_path")
    if "megatron" in (saved.get("data.order"), now["data.order"]):
        # it shuffles all epochs of the run together
        keys += [key for key in ("training.train_iters", *_BATCH_KEYS) if key in changed]
    elif "training.train_iters" in changed and _depends_on_length(saved) and _depends_on_length(now):
        keys.append("training.train_iters")
    return keys


def _content_changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, read: Sequence[Identity] | None, data: Sequence[Identity]
) -> str:
    """Describe which training sets have other files than those that were `read`; sets are the same by their names."""
    if read is None or "data.data_path" not in saved:
        return ""
    old, new = _by_name(saved["data.data_path"], read), _by_name(now["data.data_path"], data)
    differences = {name: describe_difference(old[name], new[name]) for name in new if name in old}
    return ", ".join(f"the files of {name[0]} changed, {text}" for name, text in differences.items() if text)


def _by_name(entries: Sequence[str], identities: Sequence[Identity]) -> dict[tuple[str, int], Identity]:
    """Return each set's identity by its name without the folder, and by which of the sets of this name it is."""
    names = _set_names(entries)
    places = [names[:number].count(name) for number, name in enumerate(names)]
    return dict(zip(zip(names, places, strict=True), identities, strict=False))


def _set_names(entries: Sequence[str]) -> list[str]:
    return [Path(prefix).name for prefix in parse_data_path(entries)[1]]


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return key in allowed or (key in _ANY_DATA_KEYS and ANY_DATA in allowed)


def _names(refused: Sequence[str]) -> list[str]:
    """Return what to write into checkpoint.allow_changes to allow these keys."""
    others = [key for key in refused if key not in _ANY_DATA_KEYS]
    is_single = len(refused) - len(others) == 1
    return [*refused] if is_single else [ANY_DATA, *others] if len(others) < len(refused) else others


def _depends_on_length(values: Mapping[str, Any]) -> bool:
    """Return whether the learning rate at a step depends on train_iters. A converted checkpoint has no schedule."""
    has_end = any(values.get(f"optimizer.{key}") is not None for key in ("lr_decay_iters", "lr_decay_tokens"))
    style = values.get("optimizer.lr_decay_style", "constant")
    is_level = style == "constant" and not values.get("optimizer.lr_warmup_fraction")
    return not (has_end or is_level)


def _has_other_sets(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the order of samples changes: it depends on the datasets' names and weights, not their folders."""
    old, new = saved["data.data_path"], now["data.data_path"]
    return parse_data_path(old)[0] != parse_data_path(new)[0] or _set_names(old) != _set_names(new)
