"""Datasets made by version 0.1: accepted only if none of its known silent errors can have affected them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tf.data.indexed_dataset import DataError, IndexedDataset

_FORMAT = 1


def is_of_first_format(report: Mapping[str, Any], identities: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a report of version 0.1, which did not record the end of a document, has these inputs and
    settings."""
    first = [{**identity, "format": _FORMAT} for identity in identities]
    for identity in first:
        identity.pop("eod", None)
    return bool(report["inputs"] == first)


def check_first_format(prefix: str, report: Mapping[str, Any], tokenizer_model: Path | None) -> None:
    """Raise DataError if version 0.1 may have lost text, or stored ids that differ from the tokenizer's."""
    settings = report["settings"]
    if report.get("bad_lines"):
        _refuse(prefix, "which counted unreadable files, and good text before a damaged part, as a bad line")
    if settings.get("split_by_meta") is not None:
        _refuse(prefix, "which merged different values of --split-by-meta into one dataset if their names looked alike")
    if settings["tokenizer"]["type"] == "TikTokenizer":
        _refuse(prefix, "which encoded recently added characters differently from tiktoken")
    if (
        settings["tokenizer"]["type"] == "HFTokenizer"
        and tokenizer_model is not None
        and _cuts_or_fills(tokenizer_model)
    ):
        _refuse(prefix, f"which applied the truncation, padding or dropout in {tokenizer_model}")


def check_first_ends(prefix: str, report: Mapping[str, Any], eod: int | None) -> None:
    """Raise DataError if documents do not end with `eod`: version 0.1 chose the end from a list of names."""
    if eod is None or report["inputs"][0]["format"] != _FORMAT:
        return
    for recorded in report["data_sets"]:
        dataset = IndexedDataset(Path(prefix).parent / Path(recorded).name)
        last = dataset.ids(max(0, dataset.num_tokens - 1), dataset.num_tokens).tolist()
        if last not in ([], [eod]):
            _refuse(prefix, f"whose documents end with id {last[0]}, and not with {eod}")


def _refuse(prefix: str, why: str) -> None:
    raise DataError(
        f"{prefix}.json describes datasets made by version 0.1, {why}: remove both and run the same command again, "
        f"or choose another --output-prefix"
    )


def _cuts_or_fills(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model")
    has_dropout = isinstance(model, dict) and bool(model.get("dropout"))
    return has_dropout or content.get("truncation") is not None or content.get("padding") is not None
