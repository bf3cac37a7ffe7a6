"""The runs, the rule for learning rates and the held-out text of the growth study."""

import itertools
import json
from collections import Counter

import pytest
import yaml

from megatron_tf.config import load_config
from megatron_tf.data.sources import inputs_of
from megatron_tf.errors import UserError
from tests.support.study import MINIATURE, STUDY, module

SWEEP_SEED, Plan = module("plan").SWEEP_SEED, module("plan").Plan
Results, Study, unique = module("records").Results, module("study").Study, module("runs").unique
choose, describe_rates = module("sweeps").choose, module("sweeps").describe_rates
jobs = module("jobs")
DATA = {"data_path": ["train"], "valid_data_path": ["held_out"], "tokenizer_model": "tokenizer.model"}


class Finished:
    """A process that has ended."""

    def poll(self):
        return 0


def whole_study(name="study.yaml"):
    """The committed study, with some rate for every arm."""
    values = yaml.safe_load((STUDY / name).read_text())
    study = Study(values)
    rates = {arm.name: study.chosen_rates.get(arm.name, 2e-3) for arm in study.arms.values() if arm.rate_of is None}
    return Study({**values, "chosen_rates": rates})


@pytest.mark.parametrize("name", ["study.yaml", "study_gpu.yaml"])
def test_every_run_of_the_study_has_a_valid_configuration(tmp_path, name):
    plan = Plan(whole_study(name))
    assert plan.waiting() == []
    seen = Counter()
    data = {"data_path": ["train"], "tokenizer_type": "NullTokenizer"}
    for run in unique([*plan.sweep(), *plan.final()]).values():
        if run.seed not in (SWEEP_SEED, 1):
            continue  # differs in the seed alone
        config = {**run.config, "data": data}
        config["checkpoint"] = {**config["checkpoint"], "save": "saved"}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        model = load_config(tmp_path / "run.yaml", []).at_stage(len(run.config.get("growth", []))).model
        assert model == plan.study.model_config(run.family, run.size)
        seen[run.kind] += 1
    assert seen.keys() == {"sweep", "final", "small"}


def test_costly_budgets_have_fewer_seeds_and_the_first_is_that_of_the_sweep():
    values = yaml.safe_load(MINIATURE)
    values |= {"seeds": {"main": 5, "other": 3}, "max_seeds": {8: 2}}
    values["arms"][0] |= {"budgets": [2, 1, 8], "main": True}
    values["arms"][1] |= {"budgets": [2, 8]}
    plan = Plan(Study(values))
    small, large = "tokenformer_small", "tokenformer_large"
    final = Counter((run.arm, run.budget) for run in plan.final() if run.arm != "zero_key")
    assert final == {(small, 1): 5, (small, 2): 5, (small, 8): 2, (large, 2): 3, (large, 8): 2}
    assert {run.seed for run in plan.final() if (run.arm, run.budget) == (small, 8)} == {1, 2}
    assert {(run.arm, run.budget) for run in plan.sweep()} == {(small, 2), (large, 2), ("zero_key", 1)}


def test_several_ranks_are_started_by_torchrun(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda command, **rest: commands.append(command) or Finished())
    (tmp_path / "data.json").write_text(json.dumps({"hash": "1", "data": DATA}))
    machine = whole_study("study_gpu.yaml").machine
    for one in (machine, whole_study().machine):
        job = jobs.Job(next(Plan(whole_study()).final()), tmp_path, data=jobs.Data(tmp_path), machine=one)
        assert job.poll() is None
        assert job.poll() == 0
    torchrun = ["megatron_tf.torchrun", "--standalone", "--nproc-per-node=8", "-m", "megatron_tf.pretrain"]
    assert [command[2:-1] for command in commands[::2]] == [torchrun, ["megatron_tf.pretrain"]]
    devices = [command[command.index("--device") + 1] for command in commands[1::2]]
    assert devices == ["cuda", "cpu"]


def test_a_grown_run_spends_the_flops_of_its_target_from_scratch():
    plan = Plan(whole_study())
    study = plan.study
    for run in plan.final():
        step = study.step_flops(run.family, run.size)
        expected = study.steps(run.family, run.size, run.budget) * step
        assert run.flops + (run.parent.flops if run.parent else 0) == pytest.approx(expected, abs=step / 2)


def test_arms_that_grow_from_the_same_run_share_it_and_their_pairs_have_the_same_seed():
    plan = Plan(whole_study())
    scratch = {run.id: run for run in plan.final() if run.arm == "tokenformer_131k"}
    parents = {arm: [run.parent.id for run in plan.final() if run.arm == arm] for arm in ("zero_key", "random")}
    assert parents["zero_key"] == parents["random"]
    assert set(parents["zero_key"]) == scratch.keys()
    for run in plan.final():
        if run.parent is not None:
            assert run.parent.config["training"]["seed"] == run.config["training"]["seed"] == run.seed > SWEEP_SEED
            assert run.parent.steps[1] == run.config["growth"][0]["at_step"]


def test_an_arm_waits_until_the_rate_of_its_small_run_is_chosen():
    values = yaml.safe_load(MINIATURE)
    del values["chosen_rates"]["tokenformer_small"]
    plan = Plan(Study(values))
    assert plan.waiting() == ["tokenformer_small", "zero_key"]
    assert {run.arm for run in plan.sweep()} == {"tokenformer_small", "tokenformer_large"}


def test_a_rate_factor_changes_the_last_stage_alone():
    values = yaml.safe_load(MINIATURE)
    arm = values["arms"][-1]
    values["arms"].append({**arm, "name": "slower", "rate_of": arm["name"], "rate_factor": 0.5})
    plan = Plan(Study(values))
    chosen, slower = ([run for run in plan.final() if run.arm == name] for name in (arm["name"], "slower"))
    for one, other in zip(chosen, slower, strict=True):
        assert other.parent.id == one.parent.id
        rates = [run.config["growth"][0]["optimizer"]["lr"] for run in (one, other)]
        assert rates[1] == other.rate == 0.5 * rates[0] > 0
    assert "slower" not in {run.arm for run in plan.sweep()}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": [{"to": "small"}]}, "growing small to small does not give large|adds nothing"),
        ({"stages": [{"to": "large", "ffn_tokens": 12}]}, "growing small to large does not give large"),
        ({"grow_from": {"size": "small", "budget_ratio": 9}}, "the stages before the last cost more than budget 1"),
        ({"step_scale": "none"}, "unknown keys"),
        ({"grow_from": {"size": "medium", "budget_ratio": 1}}, "need arms that do not exist: .*tokenformer_medium"),
        ({"rate_of": "nothing"}, "need arms that do not exist: .*nothing"),
        ({"schedule": "sine"}, "schedule is one of"),
    ],
)
def test_a_study_that_is_not_valid_is_refused(changes, message):
    values = yaml.safe_load(MINIATURE)
    values["arms"][-1] |= changes
    with pytest.raises(UserError, match=message):
        list(Plan(Study(values)).final())


def sweep_result(rate, loss, arm="tokenformer_small"):
    return {
        "id": f"{arm}{rate}",
        "arm": arm,
        "kind": "sweep",
        "budget": 1,
        "rate": rate,
        "seed": 0,
        "loss": loss,
        "data": "d",
    }


def test_the_rate_with_the_lowest_loss_is_chosen_once_its_sweep_is_complete(tmp_path):
    values = yaml.safe_load(MINIATURE)
    values["rates"]["tokenformer"] = [1e-3, 2e-3, 4e-3]
    study, results = Study(values), Results(tmp_path)
    for rate, loss in ((1e-3, 3.0), (2e-3, 2.5)):
        results.add(sweep_result(rate, loss))
    assert choose(study, results, "tokenformer_small") is None
    results.add(sweep_result(4e-3, 2.6))
    for rate, loss in ((1e-3, 3.0), (2e-3, 2.5), (4e-3, 2.4)):
        results.add(sweep_result(rate, loss, arm="tokenformer_large"))
    results = Results(tmp_path)  # read again
    assert choose(study, results, "tokenformer_small") == (2e-3, {1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.6}, False)
    assert choose(study, results, "tokenformer_large").is_at_edge
    text = describe_rates(study, results)
    assert "  tokenformer_small: 0.002\n  tokenformer_large: 0.004  # at the edge of the grid" in text
    assert "no complete sweep yet: zero_key" in text


def test_results_on_other_data_are_not_continued(tmp_path):
    results = Results(tmp_path)
    results.add(sweep_result(1e-3, 3.0))
    results.check_data("d", chosen=[])
    results.check_data("e", chosen=["tokenformer_small"])
    with pytest.raises(UserError, match=r"holds results on other data \(d in tokenformer_small\)"):
        results.check_data("e", chosen=[])
    results.add(sweep_result(1e-3, 3.0) | {"id": "f", "kind": "final"})
    with pytest.raises(UserError, match="holds results on other data"):
        results.check_data("e", chosen=["tokenformer_small"])
    (tmp_path / "tokenformer_small.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"tokenformer_small\.jsonl:1: not a result"):
        Results(tmp_path)


def test_documents_are_held_out_evenly_over_each_set_and_all_others_are_trained_on(tmp_path):
    shard = tmp_path / "shard.jsonl"
    lines = [
        {"text": f"{number:04d}" + 96 * "x", "meta": {"pile_set_name": f"Set {number % 2}"}} for number in range(400)
    ]
    shard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert module("prepare").split(inputs_of([str(shard)]), tmp_path, 2000) == ["heldout_Set_0", "heldout_Set_1"]
    read = {
        name: [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout_Set_0", "heldout_Set_1")
    }
    assert sorted(itertools.chain(*read.values())) == [line["text"] for line in lines]
    held = [int(text[:4]) for text in read["heldout_Set_1"]]
    assert len(held) == 10  # its half of 2,000 bytes
    assert all(30 <= later - earlier <= 50 for earlier, later in itertools.pairwise(held))
