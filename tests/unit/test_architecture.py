"""The direction of imports: each package imports only from floors below its own, and what is around it only from it."""

from pathlib import PurePath

import pytest

from tests.support.imports import imported_names
from tests.support.paths import ROOT

FLOORS = [
    {"ahead", "errors", "files", "help_text", "host", "tokenizer_files"},
    {"failures", "figures"},
    {"extras"},
    {"config"},
    {"tokenformer"},
    {"parallel", "kernels"},
    {"layers", "data", "checkpoint"},
    {"model"},
    {"growth"},
    {"training", "inference"},
    {"convert", "planning"},
    {"modules"},
    {"commands"},
    {"pretrain", "torchrun", "generate", "evaluate", "lm_eval", "__main__"},
]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
NEW = PurePath("megatron_tf/layers/new.py")
FOLDERS = {
    "tools": ("megatron_tf.commands",),
    "benchmarks": ("megatron_tf", "benchmarks.gpu_report", "tests.support.golden"),
    "tests": ("megatron_tf", "benchmarks.gpu_report", "tests.support"),
}
"""Folder around the package -> what it may import of the repository."""


def wrong_imports(path, source):
    """Imports of a file, at this path in the repository, that the file may not have."""
    folder, *parts = path.with_suffix("").parts
    found = imported_names(source, package=".".join(path.parent.parts))
    ours = [name for name in found if name.split(".")[0] in {"megatron_tf", *FOLDERS}]
    if folder != "megatron_tf":
        return [name for name in ours if not f"{name}.".startswith(tuple(f"{each}." for each in FOLDERS[folder]))]
    return [name for name in ours if not is_below(name, parts[0])]


def is_below(name, package):
    """Whether a package of ours may import the name."""
    top, *parts = name.split(".")
    if top != "megatron_tf":
        return False
    if parts[:1] in ([], ["__version__"], [package]):
        return True
    return FLOOR.get(parts[0], len(FLOORS)) < FLOOR[package]


def test_nothing_imports_from_above():
    seen = 0
    for folder in ("megatron_tf", *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "megatron_tf" / "__init__.py":
                continue  # offers what is above it, lazily
            seen += 1
            assert not wrong_imports(path.relative_to(ROOT), path.read_text()), path
    assert seen > 250


@pytest.mark.parametrize(
    "source, name",
    [
        ("import megatron_tf.training.loop", "megatron_tf.training.loop"),
        ("import megatron_tf.training as t", "megatron_tf.training"),
        ("from megatron_tf.training import loop", "megatron_tf.training.loop"),
        ("from megatron_tf import training", "megatron_tf.training"),
        ("from megatron_tf import load", "megatron_tf.load"),
        ("from ..training import loop", "megatron_tf.training.loop"),
        ("from .. import training", "megatron_tf.training"),
        ("if TYPE_CHECKING:\n    from megatron_tf import training", "megatron_tf.training"),
        ("def f():\n    import megatron_tf.training", "megatron_tf.training"),
        ("importlib.import_module('megatron_tf.training')", "megatron_tf.training"),
        ("import_module(f'megatron_tf.training.{name}')", "megatron_tf.training"),
        ("__import__('megatron_tf.training')", "megatron_tf.training"),
        ("from tests.support import toy", "tests.support.toy"),
    ],
)
def test_every_form_of_import_is_seen(source, name):
    assert wrong_imports(NEW, source) == [name]
    for allowed in (
        "import megatron_tf",
        "from megatron_tf.kernels import eager",
        "from . import norm",
        "import torch",
    ):
        assert not wrong_imports(NEW, allowed)


@pytest.mark.parametrize(
    "path, wrong, right",
    [
        ("tools/new.py", "megatron_tf.data.order", "megatron_tf.commands.runner"),
        ("benchmarks/data/new.py", "tests.support.toy", "megatron_tf.data.order"),
        ("tests/support/new.py", "tests.unit.test_kernels", "tests.support.toy"),
        ("tests/ranks/test_new.py", "tests.ranks.test_layouts", "megatron_tf.pretrain"),
        ("tests/unit/test_new.py", "benchmarks.generation", "tests.support"),
    ],
)
def test_what_is_around_the_package_imports_its_share(path, wrong, right):
    assert wrong_imports(PurePath(path), f"import {wrong}") == [wrong]
    assert not wrong_imports(PurePath(path), f"import {right}")


TRAINING = {"observability": 0, "supervision": 0, "step": 1, "run": 2, "dry_run": 3}


def test_parts_of_training_import_only_from_floors_below():
    for part, floor in TRAINING.items():
        for path in (ROOT / "megatron_tf/training" / part).glob("*.py"):
            package = f"megatron_tf.training.{part}"
            for name in imported_names(path.read_text(), package=package):
                if name.startswith("megatron_tf.training."):
                    imported = name.split(".")[2]
                    assert imported == part or TRAINING[imported] < floor, f"{path} imports {name}"
    folders = {path.parent.name for path in (ROOT / "megatron_tf/training").rglob("?*.py")}
    assert folders == {"training", *TRAINING}
