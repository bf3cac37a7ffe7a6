"""Builds the package and its C++ index extension."""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

NO_COMPILER = (
    "error: megatron_tf needs a C++17 compiler to build its index extension: "
    "install g++ (on Debian: apt-get install g++) and run the installation again"
)


class BuildIndex(build_ext):
    """Says in one sentence that the compiler is missing."""

    def build_extensions(self) -> None:
        """Compile."""
        try:
            self.compiler.spawn([self.compiler.compiler_cxx[0], "--version"])
        except (CompileError, OSError, IndexError):
            sys.exit(NO_COMPILER)
        except Exception as error:
            if "not found" in str(error) or "No such file" in str(error) or "failed" in str(error):
                sys.exit(NO_COMPILER)
            raise
        super().build_extensions()


setup(
    name="megatron_tf",
    version="0.1.0",
    description="A Megatron-style trainer for TokenFormer language models that grow",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_tf*"]),
    package_data={"megatron_tf": ["py.typed", "*.pyi"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "backports.zstd",
        "gigatoken",
        "numpy",
        "orjson",
        "pydantic>=2.7",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "tqdm",
        "xxhash",
    ],
    extras_require={
        "plot": ["matplotlib", "tensorboard"],
        "mpi": ["mpi4py"],
        "dev": [
            "hypothesis",
            "matplotlib",
            "mpi4py",
            "mpich",
            "mypy",
            "pybind11",
            "pytest",
            "pytest-timeout",
            "ruff",
            "setuptools",
            "tensorboard",
            "tiktoken",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    ext_modules=[
        Pybind11Extension(
            "megatron_tf._index",
            ["csrc/bindings.cpp", "csrc/blend.cpp", "csrc/indexed_dataset.cpp"],
            include_dirs=["csrc"],
            depends=[
                "csrc/blend.hpp",
                "csrc/indexed_dataset.hpp",
                "csrc/parallel.hpp",
                "csrc/permutation.hpp",
                "csrc/philox.hpp",
                "csrc/sample_index.hpp",
            ],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-pthread"],
        ),
        Pybind11Extension(
            "megatron_tf._row_product",
            ["csrc/row_product_bindings.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/row_pattention.hpp", "csrc/row_product.hpp"],
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        ),
    ],
    cmdclass={"build_ext": BuildIndex},
)
