"""Builds the package and its C++ index extension."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

NO_COMPILER = (
    "error: megatron_tf needs a C++20 compiler to build its index extension: "
    "install g++ (on Debian: apt-get install g++) and run the installation again"
)
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # Apple's compiler has none: one thread decodes there


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
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["megatron_tf*"]), "megatron_tf.tools"],
    package_dir={"megatron_tf.tools": "tools"},
    package_data={"megatron_tf": ["py.typed", "*.pyi"]},
    entry_points={
        "console_scripts": ["megatron-tf = megatron_tf.__main__:main"],
        "lm_eval.models": ["megatron_tf = megatron_tf.inference.harness:MegatronTF"],  # read by lm-eval after 0.4.13
    },
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
        "eval": ["lm-eval>=0.4.13"],
        "hf": ["protobuf", "transformers>=5"],
        "gpu": ["flash-attn", "transformer_engine[pytorch]", "triton"],
        "dev": [
            "hypothesis",
            "lm-eval>=0.4.13",
            "matplotlib",
            "mpi4py",
            "mpich",
            "mypy",
            "protobuf",
            "pybind11",
            "pytest",
            "pytest-timeout",
            "ruff",
            "setuptools",
            "tensorboard",
            "tiktoken",
            "transformers>=5",
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
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-psabi", *OPENMP],
            extra_link_args=OPENMP,
        ),
    ],
    cmdclass={"build_ext": BuildIndex},
)
