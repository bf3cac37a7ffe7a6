"""Draw the pictures of architecture.md and of the README: `python docs/drawings.py [DIRECTORY]`.

They are SVG with text as text, and the same bytes in each run with the same matplotlib. The README shows `growth.svg`
at half the width of a page, so its letters are larger than those of the other two.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

RANK_COLORS = ("#4c78a8", "#f58518")
PALE_RANK_COLORS = ("#c5d5e6", "#fcd9b4")
"""The same colors behind dark text."""
NEW_COLOR = "#54a24b"
PLAIN_COLOR = "#dddddd"
INK = "#333333"
NORMAL, LARGE, HALF_WIDTH = 10.5, 12, 14
"""Font sizes in points; HALF_WIDTH is for a drawing that is shown at half the width of a page."""
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
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=color, edgecolor=INK
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
    """Draw a Pattention on two tensor-parallel ranks."""
    figure, axes = canvas(22, 8.2)
    first, second = RANK_COLORS
    tokens = [first] * 4 + [second] * 4
    text(axes, 1.6, 0.7, "input", fontsize=LARGE)
    rows(axes, 0.7, 2.1, 1.8, colors=[PLAIN_COLOR] * 5)
    text(axes, 1.6, 4.7, "x  [T, D]")
    text(axes, 5.0, 0.7, "key tokens", fontsize=LARGE)
    rows(axes, 4.1, 1.5, 1.8, colors=tokens)
    text(axes, 5.0, 5.4, "K  [N, D]")
    text(axes, 9.0, 0.7, "scores", fontsize=LARGE)
    columns(axes, 7.3, 2.1, 2.1, colors=tokens)
    text(axes, 9.0, 4.7, "A = x Kᵀ  [T, N]")
    text(axes, 14.0, 0.7, "weights", fontsize=LARGE)
    columns(axes, 12.3, 2.1, 2.1, colors=tokens)
    text(axes, 14.0, 4.45, "P = gelu(τ A / ‖A‖)\n[T, N]", va="top")
    text(axes, 17.5, 0.7, "value tokens", fontsize=LARGE)
    rows(axes, 16.6, 1.5, 1.8, colors=tokens)
    text(axes, 17.5, 5.4, "V  [N, E]")
    text(axes, 20.6, 0.7, "output", fontsize=LARGE)
    rows(axes, 19.7, 2.1, 1.8, colors=[PLAIN_COLOR] * 5)
    text(axes, 20.6, 4.45, "y = P V\n[T, E]", va="top")
    for start, end in ((2.6, 4.0), (6.0, 7.2), (10.8, 12.2), (15.8, 16.5), (18.5, 19.6)):
        arrow(axes, (start, 3.15), (end, 3.15))
    text(axes, 11.5, 6.5, "all-reduce of ‖A‖²:\none number per input token")
    arrow(axes, (11.5, 5.9), (11.5, 3.3))
    text(axes, 19.0, 6.5, "reduction of partial sums:\nE numbers per input token")
    arrow(axes, (19.0, 5.9), (19.0, 3.3))
    for number, color in enumerate(RANK_COLORS):
        axes.add_patch(Rectangle((0.7, 6.4 + 0.75 * number), 0.5, 0.42, facecolor=color))
        text(axes, 1.4, 6.62 + 0.75 * number, f"on tensor-parallel rank {number}", ha="left")
    return figure


def draw_mesh() -> Figure:
    """Draw eight ranks: two pipeline stages, two data-parallel replicas, two tensor-parallel ranks."""
    figure, axes = canvas(22, 11)
    text(axes, 6.3, 0.6, "pipeline stage 0: embedding, layers 0-5", fontsize=LARGE)
    text(axes, 17.1, 0.6, "pipeline stage 1: layers 6-11, norm, head", fontsize=LARGE)
    for stage, left in enumerate((2.6, 13.4)):
        for replica, top in enumerate((1.4, 6.0)):
            draw_tensor_parallel_pair(axes, (left, top), first_rank=4 * stage + 2 * replica)
        for tensor in range(2):
            x = left + 1.7 + 3.9 * tensor
            arrow(axes, (x, 4.2), (x, 5.7), color="#e45756", style="<|-|>")
    for top in (1.4, 6.0):
        arrow(axes, (10.25, top + 1.25), (13.05, top + 1.25), color="#3b8f89", style="<|-|>")
    text(axes, 0.15, 2.65, "data-parallel\nreplica 0", ha="left")
    text(axes, 0.15, 7.25, "data-parallel\nreplica 1", ha="left")
    legend = (
        (INK, "tensor parallel, in every layer: activations, never parameters; independent of N"),
        ("#3b8f89", "pipeline parallel, per micro-batch: hidden states forward, their gradients back"),
        ("#e45756", "data parallel, once per step: parameters gathered, gradients reduced"),
    )
    for number, (color, words) in enumerate(legend):
        y = 9.35 + 0.6 * number
        arrow(axes, (2.6, y), (3.6, y), color=color, style="<|-|>")
        text(axes, 3.9, y, words, ha="left")
    return figure


def draw_tensor_parallel_pair(axes: Axes, corner: tuple[float, float], *, first_rank: int) -> None:
    """Draw two ranks that share one pipeline stage of one replica; `corner` is their upper left one."""
    left, top = corner
    frame = Rectangle((left - 0.3, top - 0.25), 7.9, 3.0, facecolor="none", edgecolor="#999999", linestyle="--")
    axes.add_patch(frame)
    for tensor, half in enumerate(("first", "second")):
        box(
            axes,
            (left + 3.9 * tensor, top),
            (3.4, 2.5),
            words=f"rank {first_rank + tensor}\n{half} half of\nthe tokens",
            color=PALE_RANK_COLORS[tensor],
        )
    arrow(axes, (left + 3.4, top + 1.25), (left + 3.9, top + 1.25), style="<|-|>")


def draw_growth() -> Figure:
    """Draw a Pattention before and after growing by zero keys."""
    figure, axes = canvas(15, 10)
    old, new = RANK_COLORS[0], NEW_COLOR
    for left, words in ((0.8, "before: N tokens"), (8.4, "after: N + M tokens")):
        text(axes, left + 2.9, 0.6, words, fontsize=HALF_WIDTH + 1)
        for offset, label in ((0, "K"), (3.2, "V")):
            text(axes, left + offset + 1.3, 1.4, label, fontsize=HALF_WIDTH)
            rows(axes, left + offset, 1.8, 2.6, colors=[old] * 5)
    text(axes, 3.7, 4.5, "τ = √N", fontsize=HALF_WIDTH)
    arrow(axes, (6.8, 2.85), (8.2, 2.85))
    text(axes, 7.5, 2.4, "grow", fontsize=HALF_WIDTH)
    axes.add_patch(Rectangle((8.4, 3.9), 2.6, 1.26, facecolor="none", edgecolor=new, linewidth=2))
    text(axes, 9.7, 4.53, "0", fontsize=HALF_WIDTH, color=new)
    rows(axes, 11.6, 3.9, 2.6, colors=[new] * 3)
    text(axes, 11.3, 5.75, "τ = √N, kept", fontsize=HALF_WIDTH)
    axes.add_patch(Rectangle((0.4, 6.4), 14.2, 3.3, facecolor="#eef3ea", edgecolor="#b9c7b0"))
    words = (
        "New keys are 0, so new scores are 0: ‖A‖ is unchanged,\n"
        "and gelu(0) = 0 gives the new values no weight.\n"
        "Every logit stays the same; old Adam moments are kept.\n"
        "gelu′(0) = ½, so the new keys train from the next step on."
    )
    text(axes, 7.5, 8.05, words, fontsize=HALF_WIDTH, linespacing=1.4)
    return figure


DRAWINGS = {"pattention": draw_pattention, "mesh": draw_mesh, "growth": draw_growth}


def main() -> None:
    """Write every drawing."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in DRAWINGS.items():
        draw().savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
