"""The picture of `megatron-tf plot-run`."""

import pytest

from megatron_tf.commands import plot_run


def test_a_smoothed_line_does_not_lag_behind_a_slope():
    slope = [float(step) for step in range(100)]
    half = plot_run.SMOOTHING_STEPS // 2
    assert plot_run.smooth(slope)[half:-half] == pytest.approx(slope[half:-half])
    assert plot_run.smooth([3.0]) == [3.0]
    assert plot_run.smooth([1.0, 3.0]) == [2.0, 2.0]


@pytest.mark.parametrize("x, label", [("tokens", "200 k"), ("step", "200")])
def test_large_counts_are_written_with_a_unit_on_the_axis(x, label, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    axes = []

    class Kept(figure.Figure):
        def savefig(self, *arguments, **options):
            axes.extend(self.axes)
            return super().savefig(*arguments, **options)

    steps = {step: {"loss": 5.0, "tokens": 1000 * step, "step": step} for step in range(1, 401)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "Figure", Kept)
        plot_run.draw([plot_run.Stage(1, {"tp": 1}, steps)], tmp_path / "loss.png", title="", x=x)
    assert label in [tick.get_text() for tick in axes[0].get_xticklabels()]
