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

PLOT = ["matplotlib>=3.8", "tensorboard>=2.17.1"]
MPI = ["mpi4py>=4.1"]
EVAL = ["lm-eval>=0.4.13,<0.5"]  # 0.5 replaces the registry that our model class is entered in
HF = ["protobuf>=5.26", "transformers>=5.4,<6"]  # older ones convert SentencePiece wrongly, or leave weights untied
MEGATRON = ["megatron-core>=0.16; sys_platform == 'linux'"]  # whose order of samples ours is compared with
TRITON = ["triton>=3.6; sys_platform == 'linux'"]


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
    packages=find_packages(include=["megatron_tf*"]),
    package_data={"megatron_tf": ["py.typed"], "megatron_tf.data": ["*.pyi"], "megatron_tf.kernels": ["*.pyi"]},
    entry_points={
        "console_scripts": ["megatron-tf = megatron_tf.__main__:main"],
        "lm_eval.models": ["megatron_tf = megatron_tf.inference.harness:MegatronTF"],  # read by lm-eval after 0.4.13
    },
    python_requires=">=3.11",
    # Lower bounds are tested (requirements/oldest.txt). Upper bounds keep out major versions known to break us.
    install_requires=[
        "torch>=2.11",
        "backports.zstd>=1.0; python_version < '3.14'",
        "gigatoken>=0.10",
        "numpy>=1.26.4",
        "orjson>=3.10",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0.1",
        "sentencepiece>=0.2.0",
        "tokenizers>=0.22.1",
        "tqdm>=4.66",
        "xxhash>=3.4.1",
    ],
    extras_require={
        "plot": PLOT,
        "mpi": MPI,
        "eval": EVAL,
        "hf": HF,
        "wandb": ["wandb>=0.17"],
        "gpu": ["flash-attn>=2.6", "transformer_engine[pytorch]>=2.0", *TRITON],
        "bench": MEGATRON,
        "dev": [
            *PLOT,
            *MPI,
            *EVAL,
            *HF,
            *MEGATRON,
            *TRITON,
            "accelerate>=1.1",
            "hypothesis>=6.100",
            "mpich>=4.2.3; sys_platform != 'win32'",
            "mypy>=2.0",
            "packaging>=24.2",
            "pip>=24",
            "pyarrow>=17",
            "pybind11>=2.12",
            "pytest>=8.0",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.6.1",
            "ruff>=0.17",
            "safetensors>=0.4.5",
            "setuptools>=77.0.3",
            "tiktoken>=0.9",
            "types-PyYAML>=6.0.12",
            "types-tqdm>=4.66",
        ],
    },
    ext_modules=[
        Pybind11Extension(
            "megatron_tf.data._index",
            ["csrc/index_bindings.cpp", "csrc/blend.cpp", "csrc/indexed_dataset.cpp"],
            include_dirs=["csrc"],
            depends=[
                "csrc/blend.hpp",
                "csrc/indexed_dataset.hpp",
                "csrc/parallel.hpp",
                "csrc/permutation.hpp",
                "csrc/philox.hpp",
                "csrc/sample_index.hpp",
            ],
            cxx_std=20,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"],
        ),
        Pybind11Extension(
            "megatron_tf.kernels._row_product",
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
