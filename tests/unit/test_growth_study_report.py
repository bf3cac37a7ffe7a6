"""The statistics of the growth study against values computed by hand, and its report from committed results."""

import math
import shutil
import statistics

import numpy as np
import pytest
import yaml

from tests.support.paths import DATA, ROOT
from tests.support.study import MINIATURE, STUDY, module

Evidence = module("comparisons").Evidence
Interval, interval, loss_at, flops_at = (
    getattr(module("intervals"), name) for name in ("Interval", "interval", "loss_at", "flops_at")
)
Results, Study = module("records").Results, module("study").Study
FIXTURE = DATA / "growth_study"


def test_the_interval_of_three_values_uses_students_t():
    """Of 1, 2, 3: the standard deviation is 1, and 4.303 / sqrt(3) = 2.484."""
    found = interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843, 3), abs=1e-4)
    assert not found.has_too_few
    assert interval([5.0]) == (5.0, 5.0, 5.0, 1)
    assert interval([5.0, 6.0]).has_too_few
    assert interval([]) is None
    assert Interval(0.0, -math.log(2), math.log(2), 3).exp() == pytest.approx((1.0, 0.5, 2.0, 3))


def test_a_power_law_is_interpolated_exactly_and_not_beyond_its_ends():
    curve = [(flops, 40 * flops**-0.1) for flops in (4e9, 1e9, 16e9)]
    for flops in (1e9, 2e9, 4e9, 5e9, 16e9, 1.005 * 16e9):
        assert loss_at(curve, flops) == pytest.approx(40 * flops**-0.1, rel=1e-12)
    for flops in (1e9, 2e9, 5e9, 16e9):
        assert flops_at(curve, 40 * flops**-0.1) == pytest.approx(flops, rel=1e-9)
    assert loss_at(curve, 0.9e9) is None
    assert loss_at(curve, 17e9) is None
    assert loss_at(curve[:1], 1.005 * 4e9) == curve[0][1]
    assert loss_at(curve[:1], 1.02 * 4e9) is None
    assert flops_at(curve, 40 * 20e9**-0.1) is None
    assert flops_at(curve, 40 * 0.9e9**-0.1) is None


def result(arm, *, flops, loss, seed, budget, small=0.0, **others):
    number = f"{arm}{budget}{seed}"
    values = {"id": number, "arm": arm, "kind": "final", "budget": budget, "rate": 1.0, "seed": seed, "parent": None}
    return {**values, "flops": flops, "stage_flops": flops - small, "loss": loss, "data": "d", **others}


def test_a_grown_arm_is_compared_seed_by_seed_at_equal_flops(tmp_path):
    """The curve of seed s is (4 + s) (F / 1e9)^-0.1; the grown runs have 2e9 FLOPs, half of them in the small run."""
    study, results = Study(yaml.safe_load(MINIATURE)), Results(tmp_path)
    excess = {1: 0.01, 2: 0.03, 3: 0.02}
    for seed, more in excess.items():
        for budget, flops in ((1, 1e9), (2, 4e9)):
            loss = (4 + seed) * (flops / 1e9) ** -0.1
            results.add(result("tokenformer_large", flops=flops, loss=loss, seed=seed, budget=budget))
        evaluations = [[10, 0, 0, 5.0]]
        results.add(
            result(
                "tokenformer_small", flops=1e9, loss=5.0, seed=seed, budget=1, evaluations=evaluations, id=f"s{seed}"
            )
        )
        after = [[10, 0, 0, 5.0 + seed], [11, 0, 0, 5.5], [14, 0, 0, 4.9]]
        loss = (4 + seed) * 2**-0.1 + more
        grown = {"parent": f"s{seed}", "growth": [10], "evaluations": after, "small": 1e9}
        results.add(result("zero_key", flops=2e9, loss=loss, seed=seed, budget=1, **grown))
    (found,) = Evidence(study, results).comparisons(study.arms.values())
    assert found.difference == pytest.approx((0.02, 0.02 - 0.02484, 0.02 + 0.02484, 3), abs=1e-5)
    assert found.verdict == "unclear"
    at_last_stage = [(4 + seed) * 2**-0.1 + more - (4 + seed) for seed, more in excess.items()]
    assert found.given_small.mean == pytest.approx(statistics.fmean(at_last_stage))
    # (loss / (4 + s))^-10 is the multiple of 1e9 FLOPs at which the curve has this loss
    logs = [math.log(2 / (2**-0.1 + more / (4 + seed)) ** -10) for seed, more in excess.items()]
    assert found.ratio.mean == pytest.approx(math.exp(statistics.fmean(logs)))
    assert found.below_curve == 0
    assert found.jump == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843, 3), abs=1e-4)
    assert list(found.recovery) == [4, 4, 4]


def test_no_ratio_is_given_if_one_seed_is_below_the_whole_curve(tmp_path):
    """A mean over the other seeds alone would make growing look worse than it is."""
    study, results = Study(yaml.safe_load(MINIATURE)), Results(tmp_path)
    for seed, loss in ((1, 3.5), (2, 2.9), (3, 3.5)):
        for budget, flops, at in ((1, 1e9, 4.0), (2, 4e9, 3.0)):
            results.add(result("tokenformer_large", flops=flops, loss=at, seed=seed, budget=budget))
        results.add(result("zero_key", flops=2e9, loss=loss, seed=seed, budget=1, growth=[1], evaluations=[]))
    (found,) = Evidence(study, results).comparisons(study.arms.values())
    assert found.ratio is None
    assert found.below_curve == 1
    assert found.difference.count == 3
    assert module("tables").ratio(found) == "below the baseline's lowest loss (1 of 3 seeds)"


def test_a_choice_is_compared_with_another_seed_by_seed_at_equal_flops(tmp_path):
    """Losses differ by 0.5 between seeds, and by 0.01 to 0.03 between the arms; another budget is of one arm only."""
    values = yaml.safe_load(MINIATURE)
    values["arms"].append(values["arms"][-1] | {"name": "random"})
    study, results = Study(values | {"choices": {"random": "zero_key"}}), Results(tmp_path)
    for seed, more in {1: 0.01, 2: 0.03, 3: 0.02}.items():
        around = {"seed": seed, "growth": [1], "evaluations": []}
        results.add(result("zero_key", flops=2e9, loss=4 + seed / 2, budget=1, **around))
        results.add(result("random", flops=2.001e9, loss=4 + seed / 2 + more, budget=1, **around))
        results.add(result("random", flops=4e9, loss=3.0, budget=2, **around))
    table = module("tables").choice_table(Evidence(study, results).choices())
    assert table.splitlines()[2:] == ["| random | zero_key | 1 | 3 | 0.0200 [-0.0048, 0.0448] |"]


def test_the_loss_before_a_second_growth_is_that_of_the_same_run(tmp_path):
    evaluations = [[10, 0, 0, 5.0], [20, 0, 0, 4.0], [20, 0, 0, 4.5], [24, 0, 0, 3.9]]
    study = Study(yaml.safe_load(MINIATURE))
    found = Evidence(study, Results(tmp_path)).around_growth({"growth": [10, 20], "evaluations": evaluations})
    assert found == (0.5, 4)


@pytest.fixture
def report(tmp_path):
    """Builds the report of the committed results in a directory, and returns the page."""

    def build(results=FIXTURE):
        places = ["--page", tmp_path / "page.md", "--figures", tmp_path / "figures", "--results", results]
        code = module("report").main([*map(str, places), "--study", str(FIXTURE / "study.yaml")])
        return code, tmp_path / "page.md"

    return build


def test_the_report_is_built_from_the_results_alone_and_is_the_same_each_time(report, tmp_path):
    pytest.importorskip("matplotlib")
    assert report()[0] == 0
    files = [tmp_path / "page.md", *sorted((tmp_path / "figures").iterdir())]
    assert [path.name for path in files[1:]] == ["difference.svg", "loss.svg", "recovery.svg"]
    before = [path.read_bytes() for path in files]
    page = files[0].read_text()
    files[0].write_text(page.replace("| zero_key |", "| by hand |"))
    assert report()[0] == 0
    assert [path.read_bytes() for path in files] == before
    assert "zero_key" in files[2].read_text()
    lines = {path.stem: [yaml.safe_load(line) for line in path.open()] for path in FIXTURE.glob("*.jsonl")}
    curves = {
        seed: np.log([(one["flops"], one["loss"]) for one in lines["tokenformer_large"] if one["seed"] == seed]).T
        for seed in (1, 2, 3)
    }
    grown = [one for one in lines["zero_key"] if one["budget"] == 2]
    differences = [one["loss"] - np.exp(np.interp(np.log(one["flops"]), *curves[one["seed"]])) for one in grown]
    (row,) = [line for line in page.splitlines() if line.startswith("| zero_key | 2 | 3 | ")]
    assert float(row.split(" | ")[4].split()[0]) == pytest.approx(np.mean(differences), abs=1e-3)
    assert "Too few seeds for a conclusion: random at 2." in page


def test_a_page_without_a_place_for_each_table_is_refused(report, capsys):
    _, page = report()
    page.write_text(page.read_text().replace("<!-- table: rates -->", "<!-- table: ratings -->"))
    assert report()[0] == 1
    assert "the page needs each table once: missing ['rates'], unknown ['ratings']" in capsys.readouterr().err


def test_a_directory_without_results_is_refused(report, tmp_path, capsys):
    assert report(tmp_path / "none")[0] == 1
    assert "holds no results: run examples/growth_study/run.py first" in capsys.readouterr().err


def test_verdicts_need_three_seeds_and_an_interval_without_zero(tmp_path):
    study, results = Study(yaml.safe_load(MINIATURE)), Results(tmp_path)
    shutil.copytree(FIXTURE, tmp_path / "copy")
    results = Results(tmp_path / "copy")
    (found, *_) = Evidence(study, results).comparisons(study.arms.values())
    for low, high, count, verdict in (
        (0.1, 0.2, 3, "loses"),
        (-0.2, -0.1, 3, "wins"),
        (-0.1, 0.1, 3, "unclear"),
        (0.1, 0.2, 2, "unclear"),
    ):
        other = type(found)(**{**vars(found), "difference": Interval((low + high) / 2, low, high, count)})
        assert other.verdict == verdict


def test_the_page_shows_the_committed_results():
    study, results = Study.read(STUDY / "study.yaml"), Results(STUDY / "results")
    page = (ROOT / "docs" / "growth_study.md").read_text()
    built = module("report").fill(page, module("tables").all_tables(study, results))
    assert built == page, "run examples/growth_study/report.py"
