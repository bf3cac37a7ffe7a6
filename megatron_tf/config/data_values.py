"""Values of `data` that are written as text: blends of datasets, and the shares of a split."""

import math
from collections.abc import Sequence

from megatron_tf.config.errors import ConfigError


def parse_data_path(entries: Sequence[str], *, key: str = "data.data_path") -> tuple[list[float], list[str]]:
    """Parse entries "PREFIX" or "WEIGHT PREFIX" into (weights, prefixes); weights are 1 if none are given.

    Raises ConfigError, naming `key`, if only some entries have a weight, or if the weights are invalid.
    """
    fields = [entry.split(maxsplit=1) for entry in entries]
    if all(len(field) == 1 for field in fields):
        return [1.0] * len(fields), [field[0] for field in fields]
    try:
        weights, prefixes = [float(weight) for weight, _ in fields], [prefix for _, prefix in fields]
    except ValueError:
        raise ConfigError(f"{key}: write every entry as PREFIX, or every one as WEIGHT PREFIX: {entries}") from None
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise ConfigError(f"{key}: weights must be finite and non-negative, and at least one positive, got {weights}")
    return weights, prefixes


def parse_split(text: str, *, key: str = "data.split") -> list[float]:
    """Parse a split such as "969,30,1" into its shares for training, validation and test.

    Raises ConfigError, naming `key`, unless it has three non-negative shares, not all zero.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(share >= 0 for share in shares) or not 0 < sum(shares) < math.inf:
        raise ConfigError(f"{key} is {text!r}: write three shares, such as 969,30,1")
    return shares
