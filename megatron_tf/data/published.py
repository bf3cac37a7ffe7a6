"""Finished datasets of a prefix: their report, ownership of their names, and the parts left over from making them."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tf.data.document_sets import sets_path
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.output_names import mask_prefix
from megatron_tf.files import locked, write_json

_OWN = re.compile(r"lock|data_sets(\.tmp)?|\d{5,}(-.+)?\.(bin|lengths|sets|mask|json|json\.tmp|tmp)")


def parts_directory(prefix: str) -> Path:
    """Return the directory for unfinished work on the datasets of a prefix."""
    return Path(f"{prefix}.parts")


@contextmanager
def exclusive(prefix: str) -> Iterator[None]:
    """Lock a prefix for this process. Raises DataError if another process holds it, or its directory is not ours."""
    directory = parts_directory(prefix)
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} was not made by this tool: remove it, or choose another --output-prefix")
    directory.mkdir(parents=True, exist_ok=True)
    busy = f"another process is writing {prefix}: wait for it, or choose another prefix"
    with locked(directory / "lock", timeout=0, busy=busy, error=DataError):
        other = next((path for path in sorted(directory.iterdir()) if not _OWN.fullmatch(path.name)), None)
        if other is not None:
            raise DataError(f"{other} is not a file made by this tool: choose another --output-prefix")
        yield


def read_report(prefix: str) -> dict[str, Any] | None:
    """Read PREFIX.json; None if it is missing. Raises DataError if it is not a report of ours."""
    path = Path(f"{prefix}.json")
    if not os.path.lexists(path):
        return None
    try:
        report: Any = json.loads(path.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict) or not {"version", "settings", "inputs", "data_sets"} <= report.keys():
        raise DataError(
            f"{path} is not a report made by this tool and would be overwritten: choose another --output-prefix"
        )
    return report


def report_of(prefix: str | Path) -> dict[str, Any] | None:
    """Read the report next to a dataset, which names its `tokenizer`; None if it is missing, as with other programs.

    Raises DataError if the file is not a report.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    try:
        report: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not the report of a dataset: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("tokenizer"), dict):
        raise DataError(f"{path} is not the report of a dataset: it names no tokenizer")
    return report


def missing_file(prefix: str, report: dict[str, Any]) -> Path | None:
    """Return a missing file of a report's datasets; None if all exist.

    Raises DataError if a file does not match the report: it may belong to another dataset.
    """
    for recorded, counts in report["data_sets"].items():
        dataset = Path(prefix).parent / Path(recorded).name  # the report may have been moved with its datasets
        mask = [Path(f"{mask_prefix(dataset)}.{kind}") for kind in ("idx", "bin")] if "targets" in counts else []
        for path in (Path(f"{dataset}.idx"), Path(f"{dataset}.bin"), sets_path(dataset), *mask):
            if not os.path.lexists(path):
                return path
        remedy = f"remove {prefix}.json and the datasets it names, and run the same command again"
        try:
            found = IndexedDataset(dataset)
        except DataError as error:
            raise DataError(f"{error}; {remedy}") from None
        if (len(found), found.num_tokens) != (counts["documents"], counts["tokens"]):
            raise DataError(
                f"{dataset} has {len(found):,} documents and {found.num_tokens:,} tokens, {prefix}.json says "
                f"{counts['documents']:,} and {counts['tokens']:,}: {remedy}"
            )
    return None


def claim(prefix: str, datasets: Iterable[str], are_ours: bool = False) -> None:
    """Record that datasets are being made here. Raises DataError if other files already have their names."""
    path = parts_directory(prefix) / "data_sets"
    claimed = set(json.loads(path.read_text())) if path.exists() else set()
    new = {Path(dataset).name for dataset in datasets} - claimed
    for name in sorted(new) if not are_ours else ():
        for target in _files(Path(prefix).parent / name):
            if os.path.lexists(target):
                raise DataError(
                    f"{target} exists and was not written by this command: remove that dataset, "
                    f"or choose another --output-prefix"
                )
    if new:
        write_json(path, sorted(claimed | new))


def _files(dataset: Path) -> Sequence[Path]:
    masks = (Path(f"{mask_prefix(dataset)}.{kind}") for kind in ("idx", "bin"))
    return [*(Path(f"{dataset}.{kind}") for kind in ("idx", "bin", "json")), sets_path(dataset), *masks]


def remove_parts(prefix: str) -> None:
    """Remove the parts and the lock of finished datasets."""
    shutil.rmtree(parts_directory(prefix))
