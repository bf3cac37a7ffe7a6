"""Saving the figures of commands."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", output: Path, *, option: str) -> None:
    """Write a figure, and the folder for it. Raises UserError, naming `option`, if the suffix is no image format."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output)
    except ValueError as error:
        raise UserError(f"{option} {output}: {error}") from error
