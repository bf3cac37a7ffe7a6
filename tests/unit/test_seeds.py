"""No test uses randomness without a seed."""

import ast

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.seed import SEED

TAKE_A_SEED = {"random.Random"} | {
    f"numpy.random.{name}" for name in ("default_rng", "Philox", "PCG64", "SeedSequence")
}
HAVE_NONE = {
    "os.urandom",
    "os.getrandom",
    "uuid.uuid1",
    "uuid.uuid4",
    "torch.seed",
    "torch.random.seed",
    "torch.cuda.seed",
}
OPTIONS = {"derandomize": False, "use_true_random": True}  # of hypothesis


def unseeded(source):
    """(line, name) of what draws random numbers without a seed."""
    tree = ast.parse(source)
    names = dict(imported(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    with_arguments = {id(call.func) for call in calls if call.args or call.keywords}
    for node in ast.walk(tree):
        name = dotted(node, names)
        if has_no_seed(name) or (name in TAKE_A_SEED and id(node) not in with_arguments):
            yield node.lineno, name
    for keyword in (keyword for call in calls for keyword in call.keywords):
        if keyword.arg in OPTIONS and ast.literal_eval(keyword.value) is OPTIONS[keyword.arg]:
            yield keyword.lineno, keyword.arg


def has_no_seed(name):
    """Whether it never has one, or has one only through the state of a module."""
    if name is None or name in TAKE_A_SEED:
        return False
    return name in HAVE_NONE or name.startswith(("secrets.", "random.", "numpy.random."))


def imported(tree):
    """(name in the file, what it is)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (a.asname or a.name.split(".")[0], a.name if a.asname else a.name.split(".")[0]) for a in node.names
            )
        elif isinstance(node, ast.ImportFrom):
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def dotted(node, names):
    """`np.random.rand` as numpy.random.rand; None for what does not start at an import."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (of := dotted(node.value, names)):
        return f"{of}.{node.attr}"
    return None


def test_no_test_draws_without_a_seed():
    paths = sorted((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 60
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in paths for line, name in unseeded(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.urandom(3)",
        "from os import urandom; urandom(3)",
        "import random; random.shuffle([])",
        "import random; draw = random.random",
        "import random; random.Random()",
        "from random import choice as pick; pick([1])",
        "import secrets; secrets.token_hex()",
        "import uuid; uuid.uuid4()",
        "import numpy as np; np.random.rand(3)",
        "import numpy as np; np.random.default_rng()",
        "from numpy.random import default_rng; default_rng()",
        "import torch; torch.seed()",
        "from hypothesis import settings; settings(derandomize=False)",
    ],
)
def test_such_a_test_is_found(source):
    assert len(list(unseeded(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import random; random.Random(1).random()",
        "import numpy as np; np.random.default_rng(seed=1).random()",
        "def f(random): random.shuffle([])",
        "import torch; torch.randn(3)",
        "import uuid; uuid.uuid5(uuid.NAMESPACE_URL, 'x')",
    ],
)
def test_what_has_a_seed_is_not(source):
    assert list(unseeded(source)) == []


def test_torch_and_hypothesis_are_seeded_before_each_test():
    assert torch.initial_seed() == SEED
    hypothesis = pytest.importorskip("hypothesis")
    assert hypothesis.settings.default.derandomize


def initial_seed(mesh):
    before = torch.initial_seed()
    torch.manual_seed(1)
    return before


def test_so_are_ranks(rank_pool):
    assert [rank_pool.run(initial_seed, 1, 1, 2) for _ in range(2)] == [[SEED, SEED]] * 2
