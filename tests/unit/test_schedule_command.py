"""`megatron-tf schedule`: its picture, its bubble, and what it says about a layout that can't run."""

import pytest

from megatron_tf.commands import schedule
from tests.support.paths import ROOT

CONFIG = str(ROOT / "examples/configs/tokenformer_150m.yaml")
SIZES = ["--parallel.pipeline_model_parallel_size=2", "--training.micro_batch_size=1", "--training.global_batch_size=3"]

PICTURES = {
    "1f1b": """\
1f1b: 2 ranks with 1 stage(s) each, 3 micro-batches, 12 units of time
rank 0  F0 F1 .  .  B0--- F2 B1--- .  B2---
rank 1  .  F0 B0--- F1 B1--- F2 B2---
stages of the ranks: 0 | 1
bubble 25.00%, by formula 25.00%
""",
    "zbv": """\
zbv: 2 ranks with 2 stage(s) each, 3 micro-batches, 19 units of time
rank 0  aF0 aF1 aF2 bF0 bI0 bW0 bF1 bI1 bW1 aI0 aW0 bF2 bI2 bW2 aI1 aW1 aI2 aW2
rank 1  .   aF0 bF0 aF1 bF1 bI0 bW0 aF2 aI0 aW0 bF2 bI1 bW1 aI1 bI2 aI2 aW1 bW2 aW2
stages of the ranks: 0,3 | 1,2
bubble 5.26%, by formula 5.26%
""",
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture(capsys, name):
    assert schedule.main([CONFIG, *SIZES, f"--parallel.pipeline_schedule={name}"]) == 0
    assert capsys.readouterr().out == PICTURES[name]


def test_costs_and_data_parallel_ranks(capsys):
    """Two replicas share six samples; a forward takes two units, and a backward three."""
    sizes = [*SIZES, "--training.global_batch_size=6", "--costs=2:2:1", "--world-size=4"]
    assert schedule.main([CONFIG, *sizes]) == 0
    first, rank_0, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("3 micro-batches, 20 units of time")
    assert rank_0 == "rank 0  F0--- F1--- .  .  .  B0------ F2--- B1------ .  .  B2------"


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert schedule.main([CONFIG, *SIZES, f"--plot={tmp_path / 'schedule.png'}"]) == 0
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "parallel.pipeline_model_parallel_size is 1"),
        (
            [*SIZES, "--parallel.pipeline_schedule=dualpipev"],
            "dualpipev schedule over 2 pipeline ranks needs at least 4",
        ),
        ([*SIZES, "--world-size=3"], "the world has 3 rank(s)"),
        ([*SIZES, "--parallel.num_virtual_stages_per_pipeline_rank=2"], "pipeline_schedule 1f1b runs 1 on each rank"),
        ([*SIZES, "--parallel.pipeline_model_parallel_layout=[12]"], "gives the layers of 1 stage(s), but there are 2"),
        ([*SIZES, "--parallel.pipeline_model_parallel_layout=[9,9]"], "places 18 layers ([9, 9])"),
    ],
)
def test_what_can_not_run_is_said_in_one_line(capsys, options, message):
    assert schedule.main([CONFIG, *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("costs", ["1:1", "0:1:1", "1:x:1", "1:1.5:1"])
def test_malformed_costs_are_named(capsys, costs):
    with pytest.raises(SystemExit):
        schedule.main([CONFIG, *SIZES, f"--costs={costs}"])
    assert "write three whole numbers above 0" in capsys.readouterr().err


def test_a_plot_of_an_unknown_format_is_refused_and_a_new_folder_is_made(capsys, tmp_path):
    assert schedule.main([CONFIG, *SIZES, f"--plot={tmp_path}/new/picture.foo"]) == 1
    assert f"error: --plot {tmp_path}/new/picture.foo: " in capsys.readouterr().err
    assert schedule.main([CONFIG, *SIZES, f"--plot={tmp_path}/new/picture.svg"]) == 0
