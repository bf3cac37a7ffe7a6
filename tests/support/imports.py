"""Finds the imports of Python source code."""

import ast

CALLS = ("import_module", "find_spec", "__import__")


def imported_names(source, package=""):
    """Return absolute dotted names: `from a import b` gives a.b, whether b is a module or not, also within functions.

    Relative imports start from `package`. For a call whose name is built from parts, the first part counts if it is a
    literal.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (start, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in CALLS:
            yield from filter(None, map(_literal, node.args[:1]))


def _literal(node):
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return parts[0].value.rstrip(".") if isinstance(parts[0], ast.Constant) else None
