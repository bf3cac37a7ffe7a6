"""Implementation of `inspect-checkpoint --rows`: what the tokens of each growth contribute on a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.commands.arguments import read_text
from megatron_tf.commands.runner import import_late
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_tf.inference.row_contributions import RowContribution


def show_rows(checkpoint: Path, text: Path, *, tokenizer_model: Path | None, plot: Path | None) -> int:
    """Print what each growth's tokens contribute on a text, and draw it if `plot` is an image file.

    Raises UserError if the text is empty.
    """
    from megatron_tf.inference.model import load_model
    from megatron_tf.inference.row_contributions import row_contributions, samples_of_text
    from megatron_tf.inference.tokenizer import load_tokenizer

    if plot is not None:
        with needed_by("inspect-checkpoint --plot"):
            import_late("matplotlib.figure")
    contents = read_text(text)
    model = load_model(checkpoint)
    ids = load_tokenizer(model, tokenizer_model).encode_batch([contents]).ids.tolist()
    if not ids:
        raise UserError(f"--input {text} is empty: contributions are measured on its text")
    rows = row_contributions(model, samples_of_text(ids, model.record.seq_length))
    print(f"{model.directory}, step {model.record.training.step:,}; {len(ids):,} tokens of {text}")
    print(table(rows))
    if plot is not None:
        draw(rows, plot)
        print(f"wrote {plot}")
    return 0


def table(rows: Sequence["RowContribution"]) -> str:
    """Format a table with one line for each layer, kind and growth."""
    lines = [f"{'layer':>5}  {'kind':<5}{'growth':>6}{'tokens':>10}{'contribution':>14}{'dead':>10}{'':>8}"]
    for row in sorted(rows, key=lambda row: (row.group.layer, row.group.kind, row.group.growth)):
        group = row.group
        lines.append(
            f"{group.layer:>5}  {group.kind:<5}{group.growth:>6}{row.tokens:>10,}{row.contribution:>14.4g}"
            f"{row.dead:>10,}{row.dead / row.tokens:>8.1%}"
        )
    for growth in sorted({row.group.growth for row in rows}):
        of_growth = [row for row in rows if row.group.growth == growth]
        tokens, dead = (sum(counts) for counts in zip(*((row.tokens, row.dead) for row in of_growth), strict=True))
        name = f"growth {growth}" if growth else "original"
        lines.append(f"{name}: {dead:,} of {tokens:,} tokens are dead ({dead / tokens:.1%})")
    return "\n".join(lines)


def draw(rows: Sequence["RowContribution"], output: Path) -> None:
    """Draw contribution and share of dead tokens by layer, with a column for each kind and a color for each growth."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    kinds = sorted({row.group.kind for row in rows})
    figure = Figure(figsize=(3.2 * len(kinds) + 0.4, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        above, below = panels[:, column]
        of_kind = [row for row in rows if row.group.kind == kind]
        for growth in sorted({row.group.growth for row in of_kind}):
            _draw_growth(above, below, [row for row in of_kind if row.group.growth == growth])
        above.set_title(kind)
        below.set_xlabel("layer")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
        for axes in (above, below):
            axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("contribution")
    panels[1][0].set_ylabel("dead tokens")
    panels[0][0].legend(frameon=False)
    save_figure(figure, output, option="--plot")


def _draw_growth(above: "Axes", below: "Axes", rows: Sequence["RowContribution"]) -> None:
    growth = rows[0].group.growth
    layers = [row.group.layer for row in rows]
    label = f"growth {growth}" if growth else "original"
    style = {"color": f"C{growth}", "marker": "o", "markersize": 3, "linewidth": 1}
    above.plot(layers, [row.contribution for row in rows], label=label, **style)  # type: ignore[arg-type]
    below.plot(layers, [row.dead / row.tokens for row in rows], label=label, **style)  # type: ignore[arg-type]
