"""What the code imports is declared and bounded, and the pinned lists are what pyproject.toml allows."""

import re
import sys
import sysconfig
import tomllib
from importlib.metadata import distribution, distributions, packages_distributions, requires
from pathlib import Path

import pytest

pytest.importorskip("packaging", reason="packaging is not installed")

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megatron_tf.extras import EXTRAS
from tests.support.imports import imported_names
from tests.support.paths import ROOT

NOT_INSTALLED = {
    "flash_attn": "flash-attn",
    "transformer_engine": "transformer-engine",
    "wandb": "wandb",
}
"""Modules of packages that the tests' environment does without."""
DEVELOPMENT = ("dev", "arrow", "bench", "datasets", "eval", "hf", "mpi", "plot")
"""Extras that `dev` brings."""
NO_PACKAGE = {"apex"}
"""Modules that no package index offers: built from their sources."""


def declared():
    """Every requirement of the package, extras included; what an extra takes of others is listed with these."""
    found = map(Requirement, requires("megatron_tf"))
    return [requirement for requirement in found if canonicalize_name(requirement.name) != "megatron-tf"]


def pins(name):
    """{package: version} of requirements/NAME.txt, for this platform."""
    lines = [line for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines() if line[:1].isalnum()]
    found = map(Requirement, lines)
    return {
        canonicalize_name(each.name): str(each.specifier).removeprefix("==")
        for each in found
        if each.marker is None or each.marker.evaluate()
    }


def external_modules():
    """{module: a file that imports it} for all that neither Python nor the repository has."""
    own = {"megatron_tf", "tools", "tests", "benchmarks"} | NO_PACKAGE
    found = {}
    for folder in ("megatron_tf", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported_names(path.read_text(), package=folder):
                found.setdefault(name.split(".")[0], path)
    return {module: path for module, path in found.items() if module not in own | sys.stdlib_module_names}


def test_every_import_is_of_a_declared_package():
    packages = packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    modules = external_modules()
    assert {"torch", "backports", "megatron", "wandb"} <= modules.keys()
    for module, path in modules.items():
        offered_by = {canonicalize_name(name) for name in packages.get(module, [NOT_INSTALLED.get(module, module)])}
        assert offered_by & names, f"{path} imports {module}, which pyproject.toml does not declare"


def test_every_requirement_without_an_extra_is_imported():
    packages = packages_distributions()
    imported = {canonicalize_name(name) for module in external_modules() for name in packages.get(module, [])}
    for requirement in declared():
        is_plain = requirement.marker is None or "extra" not in str(requirement.marker)
        assert not is_plain or canonicalize_name(requirement.name) in imported, f"nothing imports {requirement.name}"


def test_every_requirement_has_a_lower_bound():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in [*declared(), *map(Requirement, build)]:
        assert ">=" in {bound.operator for bound in requirement.specifier}, f"{requirement} has no lower bound"


@pytest.mark.parametrize("package, extra", EXTRAS.items())
def test_the_extra_that_a_message_names_brings_the_package(package, extra):
    brought = [
        canonicalize_name(requirement.name)
        for requirement in declared()
        if requirement.marker is not None and f'extra == "{extra}"' in str(requirement.marker)
    ]
    assert canonicalize_name(package) in brought


@pytest.mark.parametrize("name", ["tested", "oldest"])
def test_pins_are_what_pyproject_allows(name):
    pinned = pins(name)
    extras = (*DEVELOPMENT, "docs", "kubernetes") if name == "tested" else DEVELOPMENT
    for requirement in declared():
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"requirements/{name}.txt has {version}: {requirement}"


def test_the_oldest_pins_are_the_lower_bounds():
    pinned = pins("oldest")
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        (bound,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
        if name in pinned and name != "torch":
            assert Version(pinned[name]) == bound, f"{requirement}: run requirements/compile.sh"
    assert pinned["torch"] == pins("tested")["torch"]


def test_what_is_installed_is_what_is_pinned():
    made_from = Path(sys.prefix) / "requirements.txt"
    name = re.fullmatch(r"\.venv(?:-(oldest))?", Path(sys.prefix).name)
    if name is None or not made_from.exists():
        pytest.skip("only the environments of requirements/tested.txt and oldest.txt are pinned")
    pinned = pins(name[1] or "tested")
    if f"torch=={pinned['torch']}\n" not in made_from.read_text():
        pytest.skip("another PyTorch was requested")
    folder = [sysconfig.get_path("purelib")]  # setuptools adds packages of its own to sys.path
    installed = {canonicalize_name(each.name): Version(each.version).public for each in distributions(path=folder)}
    assert installed.pop("megatron-tf") == distribution("megatron_tf").version
    of_cuda = {package for package in installed if package.startswith(("nvidia-", "cuda-"))}
    assert {package: version for package, version in installed.items() if package not in of_cuda} == pinned
