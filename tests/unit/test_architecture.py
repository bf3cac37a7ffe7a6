"""The direction of imports: each package imports only from floors below its own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "megatron_tf"
FLOORS = [
    {"_index", "_row_product", "errors", "files", "help_text", "tokenizer_files"},
    {"extras"},
    {"config"},
    {"tokenformer"},
    {"parallel", "kernels"},
    {"layers", "data", "checkpoint"},
    {"model"},
    {"training", "inference"},
    {"convert"},
    {"commands"},
    {"pretrain", "torchrun", "generate", "evaluate", "lm_eval", "__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_tf."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("megatron_tf."))


def test_packages_import_only_from_floors_below():
    seen = 0
    for path in ROOT.rglob("*.py"):
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if package == "__init__":
            continue  # offers what is above it, lazily
        for imported in imports(path):
            seen += 1
            assert imported == package or FLOOR[imported] < FLOOR[package], f"{path} imports {imported}"
    assert seen > 50


TRAINING = {"observability": 0, "supervision": 0, "step": 1, "run": 2}


def test_parts_of_training_import_only_from_floors_below():
    for part, floor in TRAINING.items():
        for path in (ROOT / "training" / part).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_tf.training."):
                    imported = node.module.split(".")[2]
                    assert imported == part or TRAINING[imported] < floor, f"{path} imports {node.module}"
    assert {path.parent.name for path in (ROOT / "training").rglob("?*.py")} == {"training", *TRAINING}
