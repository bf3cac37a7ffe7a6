"""Optional packages, and the extras that install them."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.errors import UserError
from megatron_tf.failures import explain

EXTRAS = {
    "datasets": "datasets",
    "flash_attn": "gpu",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "mpi4py": "mpi",
    "pyarrow": "arrow",
    "tensorboard": "plot",
    "transformer_engine": "gpu",
    "transformers": "hf",
    "triton": "gpu",
    "wandb": "wandb",
}
"""Package -> the extra of megatron_tf that installs it."""


def how_to_install(package: str) -> str:
    """Return the pip command that installs a package; a package without an extra is a dependency of megatron_tf."""
    return install_command(EXTRAS.get(package))


def install_command(extra: str | None) -> str:
    """Return the pip command for an extra. It names a clone: megatron_tf is on no package index."""
    what = "." if extra is None else f"'.[{extra}]'"
    return f"pip install {what} in a clone of megatron_tf"


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Turn a failed import within the context into a UserError: a package that `what` needs is missing or broken."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "megatron_tf"):  # a bug of ours
            raise
        raise UserError(f"{what} needs {package}, which is not installed: {how_to_install(package)}") from error
    except (ImportError, OSError) as error:
        broken = explain(error)
        if broken is None:
            raise
        raise UserError(f"{what}: {broken}") from error
