"""The command `megatron-tf plan`: its tables, JSON, picture, and a configuration that starts."""

import json
from dataclasses import replace

import pytest
import yaml

from megatron_tf.commands import plan_layout as command
from megatron_tf.commands import progress
from megatron_tf.config import load_config, to_dict
from megatron_tf.planning.cluster import PRESETS
from megatron_tf.training.dry_run.dry_run import dry_run
from tests.support.training import small_run

FAST = {"within_node": {"gigabytes_per_second": 100, "latency_microseconds": 10}}
GROWTH = [{"at_step": 10, "ffn_tokens": 256, "qkv_tokens": 128, "proj_tokens": 128}]


def write_cluster(folder, **keys):
    values = {
        "nodes": 1,
        "ranks_per_node": 2,
        "memory_gib": 1,
        "product_teraflops": 1,
        "attention_teraflops": 1,
        "memory_gigabytes_per_second": 100,
        "between_nodes": FAST["within_node"],
        **FAST,
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(values | keys))
    return str(path)


def write_config(folder, **sections):
    growth = sections.pop("growth", [])
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(small_run(**sections)) | {"growth": growth}))
    return str(path)


def plan_json(capsys, *arguments):
    assert command.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_layouts_are_ranked_by_time_and_what_does_not_fit_is_measured(tmp_path, capsys):
    config = write_config(tmp_path, training={"global_batch_size": 1})
    (stage,) = plan_json(capsys, config, "--cluster", write_cluster(tmp_path), "--top", "100")["stages"]
    times = [plan["seconds"]["total"] for plan in stage["fitting"]]
    assert times == sorted(times)
    assert not stage["too_large"]
    peaks = sorted(plan["peak"]["bytes"] for plan in stage["fitting"])

    memory = peaks[len(peaks) // 2] / 2**30
    cluster = write_cluster(tmp_path, memory_gib=memory)
    (stage,) = plan_json(capsys, config, "--cluster", cluster, "--top", "100")["stages"]
    assert sorted(plan["peak"]["bytes"] for plan in stage["fitting"]) == [p for p in peaks if p <= memory * 2**30]
    for each in stage["too_large"]:
        assert each["missing_bytes"] == each["peak"]["bytes"] - int(memory * 2**30)


def test_progress_is_shown_while_layouts_are_planned(tmp_path, capsys, monkeypatch):
    shown = []

    def tracked(what, layouts):
        shown.append((what, len(layouts)))
        return layouts

    monkeypatch.setattr(command, "tracked", tracked)
    config = write_config(tmp_path, growth=GROWTH, checkpoint={"save": str(tmp_path / "checkpoints")})
    stages = plan_json(capsys, config, "--cluster", write_cluster(tmp_path), "--top", "1000")["stages"]
    assert len(shown) == 2
    assert shown == [("layouts", len(stage["fitting"]) + len(stage["too_large"])) for stage in stages]
    assert list(progress.tracked("layouts", [3, 1])) == [3, 1]


def test_the_written_configuration_is_the_best_layout_and_starts(tmp_path, capsys):
    config, output = write_config(tmp_path, training={"global_batch_size": 2}), tmp_path / "planned.yaml"
    cluster = write_cluster(tmp_path)
    (stage,) = plan_json(capsys, config, "--cluster", cluster, "--write", str(output))["stages"]
    best = stage["fitting"][0]
    planned = load_config(output)
    for section, keys in best["keys"].items():
        assert {key: getattr(getattr(planned, section), key) for key in keys} == keys
    found = dry_run(replace(planned, kernels=small_run().kernels), 2)
    assert max(kind.peak_bytes for kind in found.kinds) == pytest.approx(best["peak"]["bytes"], rel=0.05)


def test_stages_of_growth_are_compared_with_the_final_model_from_scratch(tmp_path, capsys):
    config = write_config(tmp_path, growth=GROWTH, checkpoint={"save": "run"}, training={"global_batch_size": 1})
    arguments = [config, "--cluster", write_cluster(tmp_path, ranks_per_node=1)]
    values = plan_json(capsys, *arguments, "--restart-minutes", "100")
    first, second = (stage["fitting"][0]["seconds"]["total"] for stage in values["stages"])
    assert second > first
    assert values["course"]["device_hours"] == pytest.approx(10 * (first + second) / 3600)
    assert values["from_scratch_device_hours"] == pytest.approx(20 * second / 3600)
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"growing takes {(first + second) / (2 * second):.1%} of that" in said
    assert f"in the same hours it is trained for {10 * (first + second) / second:,.0f} steps" in said


def test_the_picture_and_the_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "plan.png"
    arguments = [write_config(tmp_path, training={"global_batch_size": 1}), "--plot", str(output)]
    assert command.main([*arguments, "--cluster", write_cluster(tmp_path, ranks_per_node=1)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "memory of its fullest rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "9xH100"], "choose laptop, 8xH100"),
        (["--cluster", "none.yaml"], "none.yaml: cannot read"),
        (["--write", "tests/__init__.py"], "exists already"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, arguments, message):
    assert command.main([write_config(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_typing_error_in_a_cluster_is_named(tmp_path, capsys):
    assert command.main([write_config(tmp_path), "--cluster", write_cluster(tmp_path, memory_gb=1)]) == 1
    assert "did you mean 'memory_gib'?" in capsys.readouterr().err


def test_context_parallel_layouts_are_ranked_and_written(tmp_path, capsys):
    config = write_config(tmp_path, parallel={"context_parallel_size": 2}, training={"global_batch_size": 1})
    output, slow = tmp_path / "planned.yaml", {"gigabytes_per_second": 1e-3, "latency_microseconds": 1000}
    arguments = [config, "--cluster", write_cluster(tmp_path, within_node=slow), "--top", "100"]
    (stage,) = plan_json(capsys, *arguments)["stages"]
    parallel = [plan["keys"]["parallel"] for plan in stage["fitting"]]
    seen = {(keys["context_parallel_size"], keys["context_parallel_method"]) for keys in parallel}
    assert seen == {(1, "ring"), (2, "ring"), (2, "all_to_all")}
    shared = next(plan for plan in stage["fitting"] if plan["keys"]["parallel"]["context_parallel_size"] == 2)
    assert shared["seconds"]["context"] > 0

    # one sample is too few for two replicas, and two stages have nothing to do at once
    assert command.main([config, "--cluster", write_cluster(tmp_path), "--write", str(output)]) == 0
    planned = load_config(output).parallel
    assert planned.context_parallel_size * planned.tensor_model_parallel_size == 2


def test_nothing_fits_a_tiny_memory(tmp_path, capsys):
    arguments = [write_config(tmp_path, training={"global_batch_size": 1}), "--cluster"]
    assert command.main([*arguments, write_cluster(tmp_path, ranks_per_node=1, memory_gib=1e-6)]) == 1
    assert "a stage fits no layout" in capsys.readouterr().out


def test_presets_are_named_for_their_ranks():
    for name, cluster in PRESETS.items():
        assert name == "laptop" or name.startswith(f"{cluster.world_size}x")
