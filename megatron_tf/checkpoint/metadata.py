"""What metadata.json must say before anything is done with it: a stranger may have written it."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_tf.checkpoint.format import CheckpointError

MOST_STEPS = 10**15
"""No run takes more; steps become names of directories."""
_COUNTERS = ("samples", "tokens", "adam_steps", "skipped", "overflows")


def check_metadata(metadata: Any, source: object) -> None:
    """Raise CheckpointError naming the `source` and the first key that is missing or has an impossible value.

    Keys that only later writers know are left alone.
    """
    where = f"{source}"
    try:
        training = metadata["training"]
        step = training["step"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} does not say training.step: {error!r}") from error
    _check_count(f"{where}: training.step", step, most=MOST_STEPS)
    for key in _COUNTERS:
        if key in training:
            _check_count(f"{where}: training.{key}", training[key])
    for key in ("model", "config", "tau", "tokenizer"):
        _check_type(f"{where}: {key}", metadata.get(key), dict)
    _check_config(where, metadata["config"])
    for module, tau in metadata["tau"].items():
        _check_number(f"{where}: tau of {module}", tau)
    _check_type(f"{where}: lineage", metadata.get("lineage"), list)
    for event in metadata["lineage"]:
        _check_event(where, event)
    if metadata.get("after_growth") is not None:
        _check_after_growth(where, metadata["after_growth"])
    for key in ("usage", "loss_scale"):
        if metadata.get(key) is not None:
            _check_type(f"{where}: {key}", metadata[key], dict)


def is_same_tokenizer(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tokenizer is the one that was `found`.

    Weights that were imported with --vocab-size know the number of ids alone: any tokenizer with as many is accepted.
    """
    if saved.get("is_unknown"):
        return bool(saved.get("vocab_size") == found.get("vocab_size"))
    return saved == found


def _check_config(where: str, config: dict[str, Any]) -> None:
    training = config.get("training")
    _check_type(f"{where}: config.training", training, dict)
    assert isinstance(training, dict)
    _check_count(f"{where}: config.training.seq_length", training.get("seq_length"), least=1)
    if type(training.get("seed")) is not int:
        raise CheckpointError(f"{where}: config.training.seed is {training.get('seed')!r}, expected a whole number")
    data = config.get("data")
    if data is not None:
        _check_type(f"{where}: config.data", data, dict)


def _check_event(where: str, event: Any) -> None:
    _check_type(f"{where}: an entry of lineage", event, dict)
    for key in ("step", "tokens"):
        _check_count(f"{where}: lineage: {key}", event.get(key))
    kinds = event.get("kinds")
    _check_type(f"{where}: lineage: kinds", kinds, dict)
    for kind, change in kinds.items():
        if not isinstance(change, list) or len(change) != 2:
            raise CheckpointError(f"{where}: lineage: {kind} is {change!r}, expected [old, new]")
    missing = {"init", "seed"} - event.keys()
    if missing:
        raise CheckpointError(f"{where}: an entry of lineage lacks {min(missing)}")


def _check_after_growth(where: str, after: Any) -> None:
    _check_type(f"{where}: after_growth", after, dict)
    for key in ("step", "rewarmup_iters"):
        _check_count(f"{where}: after_growth.{key}", after.get(key))
    _check_number(f"{where}: after_growth.old_tokens_lr_scale", after.get("old_tokens_lr_scale"))
    _check_type(f"{where}: after_growth.old_rows", after.get("old_rows"), dict)
    for name, rows in after["old_rows"].items():
        _check_count(f"{where}: after_growth.old_rows of {name}", rows)


def _check_type(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        found = "missing" if value is None else f"{type(value).__name__}"
        raise CheckpointError(f"{what} is {found}, expected {'a list' if kind is list else 'an object'}")


def _check_count(what: str, value: Any, *, least: int = 0, most: int = 2**63 - 1) -> None:
    # bool is an int to Python
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{what} is {_shown(value)}, expected a whole number from {least} to {most}")


def _check_number(what: str, value: Any) -> None:
    is_number = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if not is_number:
        raise CheckpointError(f"{what} is {_shown(value)}, expected a finite number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
