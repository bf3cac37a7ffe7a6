"""The report: Markdown for people, JSON for programs."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu_report.result import Check, Result, Table

GOALS = (
    ("Pattention, time over the MLP's, 1536 x 6144, Triton", "pattention 1536 triton / mlp", 1.05, "at most"),
    ("Pattention, share of the bare products' rate", "pattention 1536 triton / products", 0.85, "at least"),
    ("MFU of the 1.5B model", "1.5B tokenformer MFU", 0.45, "at least"),
    ("time of a deterministic step over a usual one", "deterministic / usual", 1.10, "at most"),
)


def failures(results: Mapping[str, Result]) -> list[str]:
    """Return one line for each failed check and unfinished section."""
    lines = []
    for name, result in results.items():
        lines += [f"{name}: {_sentence(check)}" for check in result.checks if not check.passed]
        if not result.is_complete:
            lines.append(f"{name}: it did not finish")
    return lines


def write_report(folder: Path, machine: Mapping[str, str], results: Mapping[str, Result]) -> Path:
    """Write report.md and report.json into `folder`; returns the path of report.md."""
    figures = {name: value for result in results.values() for name, value in result.figures.items()}
    sections = {name: asdict(result) | {"path": None} for name, result in results.items()}
    document = {"machine": dict(machine), "failures": failures(results), "figures": figures, "sections": sections}
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    report = folder / "report.md"
    report.write_text("\n".join(_markdown(machine, results, figures)) + "\n")
    return report


def _markdown(machine: Mapping[str, str], results: Mapping[str, Result], figures: Mapping[str, float]) -> list[str]:
    lines = [f"# {machine['device'].split(',')[0]}", "", "Written by `python benchmarks/gpu.py`.", ""]
    lines += _table("", ["", ""], [[name, fact] for name, fact in machine.items()])
    found = failures(results)
    checks = sum(len(result.checks) for result in results.values())
    lines += ["", "## What is wrong", "", *([f"- {line}" for line in found] or [f"Nothing: all {checks} checks pass."])]
    lines += ["", "## Goals", ""]
    rows = [[name, f"{how} {goal}", _met(figures.get(key), goal, how)] for name, key, goal, how in GOALS]
    lines += _table("", ["", "goal", "found"], rows)
    for name, result in results.items():
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", f"{result.seconds:.0f} s."]
        for table in result.tables:
            lines += ["", *_rendered(table)]
        if result.checks:
            rows = [[c.name, c.found, c.limit, "pass" if c.passed else "**FAIL**"] for c in result.checks]
            lines += ["", *_table("", ["check", "found", "limit", ""], rows)]
        lines += ["", *(f"- Not tried: {reason}" for reason in result.skipped)] if result.skipped else []
    return lines


def _rendered(table: Table) -> list[str]:
    return _table(table.title, table.columns, table.rows)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"**{title}**", ""] if title else []
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def _met(found: float | None, goal: float, how: str) -> str:
    if found is None:
        return "not measured"
    met = found <= goal if how == "at most" else found >= goal
    return f"{found:.3f}, {'met' if met else 'missed'}"


def _sentence(check: Check) -> str:
    return f"{check.name}: {check.found}" + (f", the limit is {check.limit}" if check.limit else "")
