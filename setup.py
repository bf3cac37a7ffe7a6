"""Builds the C++ extensions; what the package is called and needs is in pyproject.toml."""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
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
            "megatron_tf.kernels._native",
            ["csrc/kernel_bindings.cpp"],
            include_dirs=["csrc"],
            depends=[
                "csrc/lanes.hpp",
                "csrc/normalization.hpp",
                "csrc/row_attention.hpp",
                "csrc/row_block.hpp",
                "csrc/row_pattention.hpp",
                "csrc/row_product.hpp",
            ],
            cxx_std=20,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-psabi", *OPENMP],
            extra_link_args=OPENMP,
        ),
    ],
    cmdclass={"build_ext": BuildIndex},
)
