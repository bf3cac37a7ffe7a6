"""A pytest plugin, `-p tests.support.without_extras`, that hides packages which only an extra installs."""

import sys

OPTIONAL = {
    "accelerate",
    "datasets",
    "hypothesis",
    "lm_eval",
    "matplotlib",
    "megatron",
    "mpi4py",
    "packaging",
    "pyarrow",
    "pybind11",
    "safetensors",
    "tensorboard",
    "tiktoken",
    "tiktoken_ext",
    "transformers",
    "triton",
}


class Without:
    """An import finder that hides modules."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


def pytest_configure():
    """Hide the modules, including those that plugins have already imported."""
    for name in list(sys.modules):
        if name.partition(".")[0] in OPTIONAL:
            del sys.modules[name]
    sys.meta_path[:] = map(Without, sys.meta_path)
