"""Measure the density of Python code in any directories: file and function sizes, arguments, comments, import cycles.

    python benchmarks/code_metrics.py megatron_tf ../torchtitan/torchtitan

prints a table with a column for each directory. Lines include comments and docstrings.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

_MANY_ARGUMENTS = 6
_KEYWORDS_FROM = 4
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Metrics:
    """The counts over the files of one directory."""

    file_lines: list[int] = field(default_factory=list)
    function_lines: list[int] = field(default_factory=list)
    calls: int = 0
    crowded_calls: int = 0
    """Calls with at least six positional arguments."""
    keyword_only: int = 0
    """Functions that have keyword-only arguments."""
    crowded_functions: int = 0
    """Functions with at least four positional parameters besides self."""
    comments: int = 0
    comprehensions: int = 0
    ternaries: int = 0
    imports: dict[str, set[str]] = field(default_factory=dict)
    """Modules that each module imports when it is imported itself."""


def measure(directory: Path) -> Metrics:
    """Count over all Python files under a directory, whose name is that of the package."""
    metrics = Metrics()
    files = sorted(directory.rglob("*.py"))
    modules = {_module_name(directory, file) for file in files}
    for file in files:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        metrics.file_lines.append(text.count("\n"))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        metrics.comments += sum(token.type == tokenize.COMMENT for token in tokens)
        for node in ast.walk(tree):
            _count(metrics, node)
        imported = _imported(tree, package=_package_of(directory, file))
        metrics.imports[_module_name(directory, file)] = {_nearest(name, modules) for name in imported} & modules
    return metrics


def _count(metrics: Metrics, node: ast.AST) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        metrics.function_lines.append((node.end_lineno or node.lineno) - node.lineno + 1)
        metrics.keyword_only += bool(node.args.kwonlyargs)
        positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        is_method = positional[:1] in (["self"], ["cls"], ["ctx"])
        metrics.crowded_functions += len(positional) - is_method >= _KEYWORDS_FROM
    elif isinstance(node, ast.Call):
        metrics.calls += 1
        metrics.crowded_calls += len(node.args) >= _MANY_ARGUMENTS
    elif isinstance(node, _COMPREHENSIONS):
        metrics.comprehensions += 1
    elif isinstance(node, ast.IfExp):
        metrics.ternaries += 1


def _module_name(directory: Path, file: Path) -> str:
    parts = file.relative_to(directory.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(directory: Path, file: Path) -> list[str]:
    return list(file.parent.relative_to(directory.parent).parts)


def _imported(tree: ast.Module, package: Sequence[str]) -> Iterator[str]:
    """Yield the full names that a module imports at import time: not in functions, nor only for type checkers."""
    statements: list[ast.stmt] = list(tree.body)
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else []
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            yield from (f"{base}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            statements += statement.orelse
        elif isinstance(statement, ast.If | ast.Try | ast.With | ast.ClassDef):
            statements += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]


def _nearest(name: str, modules: set[str]) -> str:
    """Return the module that contains a name, which may be that of a function or class."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def import_cycles(imports: dict[str, set[str]]) -> int:
    """Count the imports that must be removed, one after another, until there is no cycle."""
    graph = {module: imported - {module} for module, imported in imports.items()}
    cycles = 0
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            # each is a predecessor of the next: the last one imports the previous one
            before, after = error.args[1][:2]
            graph[after].discard(before)
            cycles += 1
        else:
            return cycles


def _spread(values: Sequence[int]) -> str:
    ninetieth = statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    return f"{statistics.median(values):.0f} / {ninetieth:.0f} / {max(values)}"


def rows(metrics: Metrics) -> dict[str, str]:
    """Return the measures of a directory by name."""
    lines = sum(metrics.file_lines)
    functions = len(metrics.function_lines)
    hundreds = lines / 100
    return {
        "files / lines": f"{len(metrics.file_lines)} / {lines:,}",
        "file lines, median / p90 / max": _spread(metrics.file_lines),
        "function lines, median / p90 / max": _spread(metrics.function_lines),
        "import cycles": f"{import_cycles(metrics.imports)}",
        "functions with keyword-only arguments": f"{metrics.keyword_only} of {functions}",
        "functions with 4 or more positional parameters": f"{metrics.crowded_functions}",
        "calls with 6 or more positional arguments, per 1,000": f"{1000 * metrics.crowded_calls / metrics.calls:.1f}",
        "comments per 100 lines": f"{metrics.comments / hundreds:.1f}",
        "comprehensions / ternaries per 100 lines": (
            f"{metrics.comprehensions / hundreds:.1f} / {metrics.ternaries / hundreds:.1f}"
        ),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY", help="a package's directory")
    directories: list[Path] = parser.parse_args().directories
    columns = [rows(measure(directory.resolve())) for directory in directories]
    print("| |", " | ".join(str(directory) for directory in directories), "|")
    print("|---" * (len(directories) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} |", " | ".join(column[name] for column in columns), "|")


if __name__ == "__main__":
    main()
