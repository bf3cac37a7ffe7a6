"""Draw the pictures of architecture.md and of the README: `python docs/drawings.py [DIRECTORY]`.

They are SVG with text as text, the same bytes at each run with the same matplotlib.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

RANK_COLORS = ("#4c78a8", "#f58518")
NEW_COLOR = "#54a24b"
PLAIN_COLOR = "#dddddd"
INK = "#333333"
SMALL, NORMAL, LARGE = 8, 9.5, 11
STRIPE = 0.42
"""Height of a row, width of a column."""
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "megatron_tf", "font.family": "sans-serif"})


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Make an empty picture in units of about a centimetre, with a white background for dark pages."""
    figure = Figure(figsize=(width / 2, height / 2), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def text(axes: Axes, x: float, y: float, words: str, **options: Any) -> None:
    """Write words, centred on a point unless `ha` says otherwise."""
    axes.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": NORMAL, "color": INK, **options})


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = INK, style: str = "-|>"
) -> None:
    """Draw an arrow from a point to another."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": style, "color": color, "linewidth": 1.3})


def box(
    axes: Axes, corner: tuple[float, float], size: tuple[float, float], *, words: str, color: str = PLAIN_COLOR
) -> None:
    """Draw a rounded box around words; `corner` is the upper left one."""
    (x, y), (width, height) = corner, size
    shape = FancyBboxPatch(
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=color, edgecolor=INK, alpha=0.85
    )
    axes.add_patch(shape)
    text(axes, x + width / 2, y + height / 2, words)


def rows(axes: Axes, x: float, y: float, width: float, *, colors: list[str]) -> None:
    """Draw a matrix by its rows, one color each; (x, y) is its upper left corner."""
    for number, color in enumerate(colors):
        stripe(axes, (x, y + number * STRIPE), (width, STRIPE), color=color)


def columns(axes: Axes, x: float, y: float, height: float, *, colors: list[str]) -> None:
    """Draw a matrix by its columns, one color each; (x, y) is its upper left corner."""
    for number, color in enumerate(colors):
        stripe(axes, (x + number * STRIPE, y), (STRIPE, height), color=color)


def stripe(axes: Axes, corner: tuple[float, float], size: tuple[float, float], *, color: str) -> None:
    """Draw a row or a column of a matrix."""
    axes.add_patch(Rectangle(corner, *size, facecolor=color, edgecolor="white", linewidth=1.2))


def draw_pattention() -> Figure:
    """A Pattention on two tensor-parallel ranks."""
    figure, axes = canvas(22, 8.2)
    first, second = RANK_COLORS
    tokens = [first] * 4 + [second] * 4
    text(axes, 1.6, 0.6, "input", fontsize=LARGE)
    rows(axes, 0.7, 2.6, 1.8, colors=[PLAIN_COLOR] * 5)
    text(axes, 1.6, 5.2, "x  [T, D]")
    text(axes, 5.0, 0.6, "key tokens", fontsize=LARGE)
    rows(axes, 4.1, 2.0, 1.8, colors=tokens)
    text(axes, 5.0, 5.9, "K  [N, D]")
    text(axes, 9.3, 0.6, "scores", fontsize=LARGE)
    columns(axes, 7.6, 2.6, 2.1, colors=tokens)
    text(axes, 9.3, 5.2, "A = x Kᵀ  [T, N]")
    text(axes, 14.1, 0.6, "weights", fontsize=LARGE)
    columns(axes, 12.4, 2.6, 2.1, colors=tokens)
    text(axes, 14.1, 5.2, "P = gelu(τ A / ‖A‖)  [T, N]")
    text(axes, 17.6, 0.6, "value tokens", fontsize=LARGE)
    rows(axes, 16.7, 2.0, 1.8, colors=tokens)
    text(axes, 17.6, 5.9, "V  [N, E]")
    text(axes, 20.6, 0.6, "output", fontsize=LARGE)
    rows(axes, 19.7, 2.6, 1.8, colors=[PLAIN_COLOR] * 5)
    text(axes, 20.6, 5.2, "y = P V  [T, E]")
    for start, end in ((2.6, 4.0), (6.0, 7.5), (11.1, 12.3), (15.9, 16.6), (18.6, 19.6)):
        arrow(axes, (start, 3.65), (end, 3.65))
    text(axes, 11.7, 6.5, "all-reduce of ‖A‖²:\none number per token", fontsize=SMALL)
    arrow(axes, (11.7, 5.95), (11.7, 3.8))
    text(axes, 19.1, 6.9, "reduce of partial sums:\nE numbers per token", fontsize=SMALL)
    arrow(axes, (19.1, 6.35), (19.1, 3.8))
    for number, color in enumerate(RANK_COLORS):
        axes.add_patch(Rectangle((0.7 + 5.4 * number, 7.25), 0.5, 0.42, facecolor=color))
        text(axes, 1.4 + 5.4 * number, 7.47, f"on tensor-parallel rank {number}", ha="left")
    return figure


def draw_mesh() -> Figure:
    """Eight ranks: two pipeline stages, two data-parallel replicas, two tensor-parallel ranks."""
    figure, axes = canvas(22, 11)
    text(axes, 6.3, 0.6, "pipeline stage 0: embedding, layers 0-5", fontsize=LARGE)
    text(axes, 17.1, 0.6, "pipeline stage 1: layers 6-11, norm, head", fontsize=LARGE)
    for stage, left in enumerate((2.6, 13.4)):
        for replica, top in enumerate((1.4, 6.0)):
            axes.add_patch(
                Rectangle((left - 0.3, top - 0.25), 7.9, 3.0, facecolor="none", edgecolor="#999999", linestyle="--")
            )
            for tensor in range(2):
                rank = 4 * stage + 2 * replica + tensor
                half = "first" if tensor == 0 else "second"
                box(
                    axes,
                    (left + 3.9 * tensor, top),
                    (3.4, 2.5),
                    words=f"rank {rank}\n{half} half of\nthe tokens",
                    color=RANK_COLORS[tensor],
                )
            arrow(axes, (left + 3.4, top + 1.25), (left + 3.9, top + 1.25), style="<|-|>")
        for tensor in range(2):
            x = left + 1.7 + 3.9 * tensor
            arrow(axes, (x, 4.0), (x, 5.95), color="#e45756", style="<|-|>")
    for top in (1.4, 6.0):
        arrow(axes, (10.25, top + 1.25), (13.05, top + 1.25), color="#72b7b2", style="<|-|>")
    text(axes, 0.15, 2.65, "data-parallel\nreplica 0", ha="left", fontsize=SMALL)
    text(axes, 0.15, 7.25, "data-parallel\nreplica 1", ha="left", fontsize=SMALL)
    legend = (
        (INK, "tensor parallel, in every layer: activations, never parameters; independent of N"),
        ("#72b7b2", "pipeline parallel, per micro-batch: hidden states forward, their gradients back"),
        ("#e45756", "data parallel, once a step: gradients"),
    )
    for number, (color, words) in enumerate(legend):
        y = 9.35 + 0.55 * number
        arrow(axes, (2.6, y), (3.6, y), color=color, style="<|-|>")
        text(axes, 3.9, y, words, ha="left")
    return figure


def draw_growth() -> Figure:
    """A Pattention before and after growing by zero keys."""
    figure, axes = canvas(22, 9.2)
    old, new = RANK_COLORS[0], NEW_COLOR
    text(axes, 4.3, 0.6, "before: N tokens", fontsize=LARGE)
    rows(axes, 1.2, 1.6, 2.4, colors=[old] * 5)
    rows(axes, 5.0, 1.6, 2.4, colors=[old] * 5)
    text(axes, 2.4, 1.2, "K")
    text(axes, 6.2, 1.2, "V")
    text(axes, 4.3, 5.3, "τ = √N")
    arrow(axes, (8.3, 2.65), (10.6, 2.65))
    text(axes, 9.45, 2.25, "grow")
    text(axes, 14.2, 0.6, "after: N + M tokens", fontsize=LARGE)
    for left, label in ((11.1, "K"), (14.9, "V")):
        rows(axes, left, 1.6, 2.4, colors=[old] * 5)
        text(axes, left + 1.2, 1.2, label)
    rows(axes, 11.1, 3.7, 2.4, colors=["#ffffff"] * 3)
    axes.add_patch(Rectangle((11.1, 3.7), 2.4, 1.26, facecolor="none", edgecolor=new, linewidth=1.6))
    text(axes, 12.3, 4.33, "0", fontsize=LARGE, color=new)
    rows(axes, 14.9, 3.7, 2.4, colors=[new] * 3)
    text(axes, 14.2, 5.3, "τ = √N, kept")
    text(axes, 17.8, 2.65, "old rows, their Adam moments\nand tau: not touched", ha="left", fontsize=SMALL)
    text(axes, 17.8, 4.33, "new rows: moments 0;\nvalues as at initialization", ha="left", fontsize=SMALL)
    box(
        axes,
        (1.2, 6.2),
        (19.6, 2.4),
        words=(
            "new scores are x·0 = 0: they add nothing to ‖A‖, and gelu(0) = 0 gives the new values weight 0\n"
            "→ every logit stays the same at the step of the growth\n"
            "gelu′(0) = ½ gives the new keys a gradient, so the new tokens train from the next step on"
        ),
        color="#eef3ea",
    )
    return figure


DRAWINGS = {"pattention": draw_pattention, "mesh": draw_mesh, "growth": draw_growth}


def main() -> None:
    """Write every drawing."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in DRAWINGS.items():
        draw().savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
