"""The results: one JSON line for each finished run, in one file for each arm."""

import json
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from runs import Run
from study import non_embedding

from megatron_tf.config import ModelConfig
from megatron_tf.errors import UserError
from megatron_tf.files import replace_durably

Result = dict[str, Any]
_ROW_MARKS = (1, 16, 256)
"""Steps after a growth whose row metrics are kept, besides the last ones; the next logged step counts."""


class Results:
    """The files of a directory. They are always complete: each is replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.by_id: dict[str, Result] = {}
        for path in sorted(directory.glob("*.jsonl")):
            for result in _read(path):
                self.by_id[result["id"]] = result

    def add(self, result: Result) -> None:
        """Add a line to the file of its arm, which is replaced as a whole, in the order of budgets, rates and seeds."""
        self.by_id[result["id"]] = result
        of_arm = [known for known in self.by_id.values() if known["arm"] == result["arm"]]
        of_arm.sort(key=lambda known: (known["kind"], known["budget"], known["rate"], known["seed"], known["id"]))
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(known, separators=(",", ":")) + "\n" for known in of_arm)
        replace_durably(self.directory / f"{result['arm']}.jsonl", lines)

    def check_data(self, data: str, *, chosen: Collection[str]) -> None:
        """Raise UserError if results on other data would be compared with those of new runs.

        A sweep has done its work once a rate is chosen: that of an arm in `chosen` may be on other data.
        """
        compared = [run for run in self.by_id.values() if run["kind"] != "sweep" or run["arm"] not in chosen]
        if other := sorted({f"{result['data']} in {result['arm']}" for result in compared if result["data"] != data}):
            raise UserError(
                f"{self.directory} holds results on other data ({', '.join(other)}) than these ({data}): prepare the "
                f"same text again, choose another --results, or remove their lines to repeat the runs"
            )


def _read(path: Path) -> list[Result]:
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a result ({error}): remove the line, and its run is repeated"
            ) from error
    return results


def result_of(run: Run, home: Path, *, data: str) -> Result:
    """Read what a finished run has left in its directory: its metrics, and its losses on the whole held-out text."""
    metrics = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    held_out = json.loads((home / "heldout.json").read_text())
    stages = [line for line in metrics if line.get("event") in ("start", "growth")]
    steps = {line["step"]: line for line in metrics if "loss" in line}
    last, first = steps[max(steps)], min(stages, key=lambda line: line["step"])
    parameters = stages[-1]["parameters"]
    # a resumed run reports another start in the same stage: the first one counts
    start_of_last = min(line["flops"] for line in stages if line["parameters"] == parameters)
    growth_steps = sorted({event["step"] for event in stages[-1]["lineage"]})
    return {
        "id": run.id,
        "parent": run.parent.id if run.parent else None,
        "arm": run.arm,
        "family": run.family,
        "size": run.size,
        "kind": run.kind,
        "budget": run.budget,
        "rate": run.rate,
        "seed": run.seed,
        "parameters": non_embedding(ModelConfig(**stages[-1]["config"]["model"])),
        "tokens": last["tokens"],
        "flops": last["flops"],
        "stage_flops": last["flops"] - start_of_last,
        "loss": round(held_out["all"]["nats_per_token"], 6),
        "bits_per_byte": round(held_out["all"]["bits_per_byte"], 6),
        "losses": {name: round(part["nats_per_token"], 6) for name, part in held_out["sets"].items()},
        "growth": growth_steps,
        "evaluations": _evaluations(metrics, steps, stages),
        "rows": _rows(steps, growth_steps),
        "seconds": round(3600 * (last["device_hours"] - first["device_hours"]), 1),
        "revision": revision(),
        "data": data,
    }


def _evaluations(
    metrics: list[Mapping[str, Any]], steps: Mapping[int, Mapping[str, Any]], stages: list[Mapping[str, Any]]
) -> list[list[float]]:
    """Return [step, tokens, flops, loss] of each evaluation within the run; two at one step are before and after a
    growth."""
    totals = {line["step"]: line for line in stages} | dict(steps)
    found: dict[tuple[int, int], list[float]] = {}
    parameters = 0
    for line in metrics:
        parameters = line.get("parameters", parameters)
        if "validation_loss" in line:
            total = totals[line["step"]]
            values = [line["step"], total["tokens"], total["flops"], round(line["validation_loss"], 5)]
            found[line["step"], parameters] = values
    return [found[key] for key in sorted(found)]


def _rows(steps: Mapping[int, Mapping[str, Any]], growth_steps: list[int]) -> list[Any]:
    """Return [step, metrics of old and new rows] at a few steps after the last growth, layers combined."""
    logged = [step for step in sorted(steps) if "rows" in steps[step]]
    if not logged:
        return []
    marks = [next((step for step in logged if step >= growth_steps[-1] + mark), logged[-1]) for mark in _ROW_MARKS]
    return [[step, _combined(steps[step]["rows"])] for step in sorted({*marks, logged[-1]})]


def _combined(rows: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Combine layers: norms are root sums of squares, counts are sums."""
    combined: dict[str, dict[str, dict[str, float]]] = {}
    for growth, kinds in rows.items():
        for kind, columns in kinds.items():
            values = combined.setdefault(growth, {}).setdefault(kind, {})
            for name, column in columns.items():
                if name in ("tokens", "dead"):
                    values[name] = sum(column)
                elif name != "layers":
                    values[name] = float(f"{sum(value * value for value in column) ** 0.5:.4g}")
    return combined


def revision() -> str:
    """Return the git revision, with + if the package was changed since then; unknown outside a repository."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return (commit + ("+" if git("status", "--porcelain", "--", "megatron_tf") else "")) or "unknown"
