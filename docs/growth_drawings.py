"""Draw the pictures of growth.md, one for each operator: `python docs/growth_drawings.py [DIRECTORY]`.

Blue is what the model had, pale blue a copy of it, green what is drawn as in a new model, white with a green frame what
is zero.
"""

import sys
from pathlib import Path

from drawings import HALF_WIDTH, INK, NEW_COLOR, NORMAL, RANK_COLORS, arrow, canvas, text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

OLD, COPY, NEW = RANK_COLORS[0], "#9ebcda", NEW_COLOR
COLORS = {"old": OLD, "copy": COPY, "new": NEW, "zero": "white"}
PALE = ("copy", "zero")
"""Fills that need dark words."""


def cell(axes: Axes, corner: tuple[float, float], size: tuple[float, float], *, kind: str, words: str = "") -> None:
    """Draw a block of rows of one kind with words in it; `corner` is the upper left one."""
    (x, y), (width, height) = corner, size
    edge = NEW if kind == "zero" else "white"
    axes.add_patch(Rectangle(corner, width, height, facecolor=COLORS[kind], edgecolor=edge, linewidth=1.5))
    text(axes, x + width / 2, y + height / 2, words, color=INK if kind in PALE else "white")


def matrix(axes: Axes, x: float, y: float, width: float, *, blocks: list[tuple[str, str, float]]) -> None:
    """Draw blocks of rows (kind, words, height) one under the other."""
    for kind, words, height in blocks:
        cell(axes, (x, y), (width, height), kind=kind, words=words)
        y += height


def pair(
    axes: Axes, left: float, *, keys: list[tuple[str, str, float]], values: list[tuple[str, str, float]], tau: str
) -> None:
    """Draw a Pattention's key and value tokens, and its temperature under them."""
    for offset, label, blocks in ((0.0, "K", keys), (2.9, "V", values)):
        text(axes, left + offset + 1.2, 1.3, label)
        matrix(axes, left + offset, 1.7, 2.4, blocks=blocks)
    bottom = 1.7 + max(sum(block[2] for block in blocks) for blocks in (keys, values))
    text(axes, left + 2.65, bottom + 0.45, tau)


def before_and_after(height: float, title: str, result: str) -> tuple[Figure, Axes]:
    """Make a picture with a heading on each side, an arrow between them, and the result below."""
    figure, axes = canvas(15, height)
    text(axes, 3.2, 0.5, "before", fontsize=HALF_WIDTH)
    text(axes, 11.2, 0.5, title, fontsize=HALF_WIDTH)
    arrow(axes, (6.6, 2.9), (7.9, 2.9))
    text(axes, 7.5, height - 0.55, result, fontsize=NORMAL + 1)
    return figure, axes


def draw_zero_key() -> Figure:
    """Draw new tokens with zero keys."""
    figure, axes = before_and_after(6.6, "zero_key", "exact: a zero key has score 0, and gelu(0) = 0")
    old = [("old", "N", 2.0)]
    pair(axes, 0.6, keys=old, values=old, tau="τ")
    pair(axes, 8.6, keys=[*old, ("zero", "0", 1.2)], values=[*old, ("new", "new", 1.2)], tau="τ, kept")
    return figure


def draw_rotated_key() -> Figure:
    """Draw rotations of all keys, with zero values."""
    result = "exact up to rounding: ‖A Qᵀ‖ = ‖A‖, so ‖A‖ grows by √m, and τ with it"
    figure, axes = before_and_after(7.4, "rotated_key, m = 2", result)
    pair(axes, 0.6, keys=[("old", "K", 1.9)], values=[("old", "V", 1.9)], tau="τ")
    keys = [("old", "K", 1.9), ("copy", "Q K", 1.9)]
    pair(axes, 8.6, keys=keys, values=[("old", "V", 1.9), ("zero", "0", 1.9)], tau="τ √2")
    return figure


def draw_duplicate() -> Figure:
    """Draw equal copies of all tokens."""
    figure, axes = before_and_after(7.4, "duplicate, m = 2", "exact up to rounding: ‖A‖ grows by √m, and τ with it")
    old = [("old", "K₁ … Kₙ", 1.9)]
    pair(axes, 0.6, keys=old, values=[("old", "V₁ … Vₙ", 1.9)], tau="τ")
    keys = [*old, ("copy", "K₁ … Kₙ", 1.9)]
    pair(axes, 8.6, keys=keys, values=[("old", "V/2 + ε", 1.9), ("copy", "V/2 − ε", 1.9)], tau="τ √2")
    return figure


def draw_duplicate_by_utility() -> Figure:
    """Draw copies of the tokens that contribute most."""
    result = "not exact: τ preserves the mean norm of a row on utility_data"
    figure, axes = before_and_after(7.4, "duplicate_by_utility", result)
    names = ("1", "2", "3", "4")
    before = [("old", f"K{name}", 0.6) for name in names], [("old", f"V{name}", 0.6) for name in names]
    pair(axes, 0.6, keys=before[0], values=before[1], tau="τ")
    keys = [*before[0], ("copy", "K2", 0.6), ("copy", "K2", 0.6)]
    values = [("old", "V1", 0.6), ("old", "V2/3 + …", 0.6), ("old", "V3", 0.6), ("old", "V4", 0.6)]
    pair(axes, 8.6, keys=keys, values=[*values, ("copy", "V2/3 + …", 0.6), ("copy", "V2/3 + …", 0.6)], tau="τ'")
    return figure


def draw_zero_value() -> Figure:
    """Draw keys as in a new model, with zero values."""
    figure, axes = before_and_after(6.6, "zero_value", "not exact: τ makes up for new keys as large as the old ones")
    old = [("old", "N", 2.0)]
    pair(axes, 0.6, keys=old, values=old, tau="τ")
    pair(axes, 8.6, keys=[*old, ("new", "new", 1.2)], values=[*old, ("zero", "0", 1.2)], tau="τ √(N'/N)")
    return figure


def draw_random() -> Figure:
    """Draw the official code's growth."""
    figure, axes = before_and_after(6.6, "random", "not exact: every weight changes, by new scores and a new τ")
    old = [("old", "N", 2.0)]
    new = [*old, ("new", "new", 1.2)]
    pair(axes, 0.6, keys=old, values=old, tau="τ = √N")
    pair(axes, 8.6, keys=new, values=new, tau="τ = √N'")
    return figure


def draw_shrink_and_perturb() -> Figure:
    """Draw shrinking and perturbing after growth by zero keys."""
    figure, axes = before_and_after(6.6, "shrink_factor s, perturb_std", "not exact: old rows W become s W + noise")
    old = [("old", "N", 2.0)]
    pair(axes, 0.6, keys=[*old, ("zero", "0", 1.2)], values=[*old, ("new", "new", 1.2)], tau="τ")
    keys = [("old", "s K + noise", 2.0), ("zero", "0", 1.2)]
    pair(axes, 8.6, keys=keys, values=[("old", "s V + noise", 2.0), ("new", "new", 1.2)], tau="τ")
    return figure


def draw_layers() -> Figure:
    """Draw the three ways to initialize a new layer."""
    figure, axes = canvas(15, 6.6)
    kinds = (
        ("identity", ("new", "new"), ("zero", "0"), "exact"),
        ("copy_zero", ("copy", "copied"), ("zero", "0"), "exact"),
        ("copy", ("copy", "copied"), ("copy", "copied"), "not exact"),
    )
    for number, (name, others, ends, result) in enumerate(kinds):
        left = 0.4 + 4.9 * number
        text(axes, left + 2.2, 0.5, name, fontsize=HALF_WIDTH)
        cell(axes, (left, 1.1), (4.4, 0.8), kind="old", words="layer 0")
        cell(axes, (left, 2.0), (4.4, 0.9), kind=others[0], words=f"qkv, keys: {others[1]}")
        cell(axes, (left, 2.95), (4.4, 0.9), kind=ends[0], words=f"values of proj, ffn: {ends[1]}")
        cell(axes, (left, 3.95), (4.4, 0.8), kind="old", words="layer 1")
        text(axes, left + 2.2, 5.3, result, fontsize=NORMAL + 1)
    text(axes, 7.5, 6.1, "zeros where a branch ends add nothing to the residual stream", fontsize=NORMAL + 1)
    return figure


def draw_layer_order() -> Figure:
    """Draw the three orders of eight layers that come from four."""
    figure, axes = canvas(15, 6.2)
    orders = {
        "interleaved": ((0, 0, 1, 1, 2, 2, 3, 3), (0, 2, 4, 6)),
        "stacked": ((0, 1, 2, 3, 0, 1, 2, 3), (0, 1, 2, 3)),
        "middle": ((0, 1, 2, 1, 2, 1, 2, 3), (0, 1, 2, 7)),
    }
    for number, (name, (layers, old)) in enumerate(orders.items()):
        y = 0.5 + 1.8 * number
        text(axes, 0.3, y + 0.5, name, fontsize=HALF_WIDTH, ha="left")
        for place, layer in enumerate(layers):
            kind = "old" if place in old else "copy"
            cell(axes, (5.0 + 1.2 * place, y), (1.1, 1.0), kind=kind, words=str(layer))
    text(axes, 7.5, 5.85, "num_layers: 8 from 4; the number is that of the old layer", fontsize=NORMAL + 1)
    return figure


def draw_width() -> Figure:
    """Draw twice the width."""
    figure, axes = canvas(15, 7.4)
    text(axes, 2.6, 0.5, "before", fontsize=HALF_WIDTH)
    text(axes, 10.4, 0.5, "hidden_multiple: 2", fontsize=HALF_WIDTH)
    arrow(axes, (5.3, 3.2), (6.4, 3.2))
    kinds = (("h", "h", "h"), ("K", "K/2 + ε", "K/2 − ε"), ("V", "V", "V"), ("norm", "w/2", "w/2"))
    for number, (name, one, other) in enumerate(kinds):
        y = 1.2 + 1.25 * number
        label = {"h": "residual stream", "K": "keys", "V": "values, embedding", "norm": "final norm"}[name]
        cell(axes, (3.0, y), (1.9, 1.0), kind="old", words="w" if name == "norm" else name)
        text(axes, 2.8, y + 0.5, label, ha="right")
        cell(axes, (6.8, y), (3.6, 1.0), kind="old", words=one)
        cell(axes, (10.5, y), (3.6, 1.0), kind="copy", words=other)
    text(
        axes,
        7.5,
        6.85,
        "exact: x'K'ᵀ = x Kᵀ, and LayerNorm of two copies is two copies of LayerNorm",
        fontsize=NORMAL + 1,
    )
    return figure


def draw_mlp() -> Figure:
    """Draw new hidden units of a plain transformer's MLP."""
    figure, axes = canvas(15, 6.4)
    kinds = (
        ("zero_key", ("zero", "0"), ("new", "new")),
        ("zero_value", ("new", "new"), ("zero", "0")),
        ("duplicate", ("copy", "U"), ("copy", "W/2 − ε")),
    )
    for number, (name, up, down) in enumerate(kinds):
        left = 0.4 + 4.95 * number
        text(axes, left + 2.15, 0.5, name, fontsize=HALF_WIDTH)
        for offset, label, old, new in ((0.0, "up", "U", up), (2.2, "down", "W", down)):
            text(axes, left + offset + 1.0, 1.2, label)
            first = "W/2 + ε" if name == "duplicate" and label == "down" else old
            matrix(axes, left + offset, 1.6, 2.0, blocks=[("old", first, 1.6), (*new, 1.6)])
    text(axes, 7.5, 5.75, "exact: y = gelu(x Uᵀ) W, and gelu(0) = 0", fontsize=NORMAL + 1)
    return figure


DRAWINGS = {
    "zero_key": draw_zero_key,
    "rotated_key": draw_rotated_key,
    "duplicate": draw_duplicate,
    "duplicate_by_utility": draw_duplicate_by_utility,
    "zero_value": draw_zero_value,
    "random": draw_random,
    "shrink_and_perturb": draw_shrink_and_perturb,
    "layers": draw_layers,
    "layer_order": draw_layer_order,
    "width": draw_width,
    "mlp": draw_mlp,
}


def main() -> None:
    """Write every drawing."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "growth"
    directory.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
