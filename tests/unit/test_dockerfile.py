"""The Dockerfile, which no test builds: it copies what there is, and installs what is missing from its image."""

import re
import shlex
import tomllib

import pytest

from tests.support.paths import ROOT


def instructions():
    """(name, its words) of each instruction, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], shlex.split(line)[1:]) for line in joined.splitlines() if line.strip()]


def words_of(name):
    return [words for found, words in instructions() if found == name]


def test_its_image_has_a_tag_that_can_be_chosen():
    assert [name for name, _ in instructions()][:2] == ["ARG", "FROM"]
    ((tag,),) = words_of("ARG")
    assert re.fullmatch(r"TAG=\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-devel", tag)
    assert words_of("FROM") == [["pytorch/pytorch:${TAG}"]]


def test_its_torch_is_one_that_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [found for found in project["dependencies"] if found.startswith("torch>=")]
    least = [int(number) for number in bound.removeprefix("torch>=").split(".")]
    ((tag,),) = words_of("ARG")
    assert [int(number) for number in tag.removeprefix("TAG=").partition("-")[0].split(".")] >= least


def test_it_installs_what_the_package_requires_but_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = [words for words in words_of("RUN") if words[:4] == ["python", "-m", "pip", "install"]]
    packages, package = ([word for word in words[4:] if not word.startswith("--")] for words in installed)
    assert sorted(packages) == sorted(found for found in project["dependencies"] if not found.startswith("torch>"))
    assert package == ["."]
    assert "--no-deps" in installed[1]
    assert all("--no-cache-dir" in words for words in installed)


@pytest.mark.parametrize("name", [word for words in words_of("COPY") for word in words[:-1]])
def test_what_it_copies_is_there(name):
    assert (ROOT / name).exists()


def test_it_copies_what_a_build_reads():
    copied = {word for words in words_of("COPY") for word in words[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", project["readme"], *project["license-files"]} <= copied
    sources = set(re.findall(r'"(csrc)/', (ROOT / "setup.py").read_text()))
    assert sources | {"megatron_tf"} <= copied
