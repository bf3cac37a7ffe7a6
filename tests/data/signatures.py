"""Write signatures.json: the parameters of what our adapters call, out of the packages' own sources.

    python tests/data/signatures.py transformer_engine=2.20.2=FOLDER flash_attn=2.6.1=FOLDER ...

FOLDER holds the sources of that version, as a wheel or an archive of sources unpacks; nothing of it is run. Versions
that are in the file already stay.
"""

import ast
import json
import sys
from pathlib import Path

OUTPUT = Path(__file__).with_suffix(".json")
# package -> what is called -> a file or folder of the package and the function or method there. Keywords that a method
# hands on to another one (**kwargs) are that one's.
CALLED = {
    "flash_attn": {
        "flash_attn_func": ["flash_attn/flash_attn_interface.py:flash_attn_func"],
        "flash_attn_varlen_func": ["flash_attn/flash_attn_interface.py:flash_attn_varlen_func"],
    },
    "flash_attn_4": {
        "flash_attn_func": ["flash_attn/cute/interface.py:flash_attn_func"],
        "flash_attn_varlen_func": ["flash_attn/cute/interface.py:flash_attn_varlen_func"],
    },
    "transformer_engine": {
        "DotProductAttention": ["transformer_engine/pytorch:DotProductAttention.__init__"],
        "DotProductAttention.forward": ["transformer_engine/pytorch:DotProductAttention.forward"],
        "LayerNorm": [
            "transformer_engine/pytorch/module:LayerNorm.__init__",
            "transformer_engine/pytorch/ops/basic:LayerNorm.__init__",
        ],
        "LayerNorm.forward": ["transformer_engine/pytorch/ops/op.py:BasicOperation.forward"],
        "FusedAdam": ["transformer_engine/pytorch/optimizers:FusedAdam.__init__"],
    },
    "apex": {
        "fused_layer_norm": ["apex/normalization/fused_layer_norm.py:fused_layer_norm"],
        "fused_layer_norm_affine": ["apex/normalization/fused_layer_norm.py:fused_layer_norm_affine"],
        "FusedAdam": ["apex/optimizers/fused_adam.py:FusedAdam.__init__"],
    },
}


def arguments_of(folder: Path, place: str) -> ast.arguments:
    """Those of one definition, without types, and with None for every default."""
    where, _, path = place.partition(":")
    files = sorted((folder / where).rglob("*.py")) or [folder / where]
    nodes: list[ast.AST] = [ast.parse(file.read_text()) for file in files]
    for name in path.split("."):
        inside = (child for node in nodes for child in ast.iter_child_nodes(node))
        nodes = [child for child in inside if getattr(child, "name", None) == name]
    (node,) = nodes
    arguments: ast.arguments = node.args  # type: ignore[attr-defined]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    return arguments


def signature(folder: Path, places: list[str]) -> str:
    """The parameters as Python writes them, without self."""
    first, *others = (arguments_of(folder, place) for place in places)
    if others:
        first.kwarg = None
    known = {argument.arg for argument in [*first.args, *first.kwonlyargs]}
    for other in others:
        for argument, default in zip(other.kwonlyargs, other.kw_defaults, strict=True):
            if argument.arg not in known:
                first.kwonlyargs.append(argument)
                first.kw_defaults.append(default)
    return ast.unparse(first).removeprefix("self, ")


def main(sources: list[str]) -> None:
    """Add the versions to the file."""
    found = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for source in sources:
        package, version, folder = source.split("=")
        signatures = {name: signature(Path(folder), places) for name, places in CALLED[package].items()}
        found.setdefault(package, {})[version] = signatures
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
