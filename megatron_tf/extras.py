"""Packages that only some jobs need, and what brings them."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.errors import UserError

EXTRAS = {
    "flash_attn": "gpu",
    "lm_eval": "eval",
    "matplotlib": "plot",
    "mpi4py": "mpi",
    "tensorboard": "plot",
    "transformer_engine": "gpu",
    "transformers": "hf",
    "triton": "gpu",
    "wandb": "wandb",
}
"""Package -> the extra of ours that requires it."""


def how_to_install(package: str) -> str:
    """The command that brings a package; one without an extra comes with megatron_tf itself."""
    extra = EXTRAS.get(package)
    return "pip install megatron_tf" if extra is None else f"pip install 'megatron_tf[{extra}]'"


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Raise UserError, with how to install it, where an import within finds a package missing; `what` needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "megatron_tf"):  # a bug of ours
            raise
        raise UserError(f"{what} needs {package}, which is not installed: {how_to_install(package)}") from error
