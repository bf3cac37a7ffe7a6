"""Runs preprocess-data on documents made here, and reads what it wrote."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_tf.commands import preprocess_data
from megatron_tf.data.document_sets import read_document_sets
from megatron_tf.data.indexed_dataset import IndexedDataset
from tests.support.paths import ROOT

EOD = 256


def make_documents(count, seed=1):
    """Yield documents of random texts with sets."""
    generator = random.Random(seed)
    words = ["growth", "naïve", "tokens", "日本", "\x00", "\n\n", "🏳️‍🌈", "x" * 300, " "]
    for _ in range(count):
        text = " ".join(generator.choices(words, k=generator.choice([0, 1, 5, 200])))
        meta = {"pile_set_name": generator.choice(["Books", "Pile-CC", "A/B c"])}
        yield {"text": text, "title": text[:5], "meta": meta}


def to_lines(items):
    """JSON lines, as bytes."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def twin(items, key="text"):
    """Ids of each document as Megatron-LM's standard tool gives them."""
    texts = [list(item[key].encode()) for item in items]
    return [[*ids, EOD] if ids else [] for ids in texts]


def read(prefix):
    """Ids of each document of a dataset."""
    dataset = IndexedDataset(prefix)
    return [dataset.document(i).tolist() for i in range(len(dataset))]


def read_sets(prefix, count):
    """(set, bytes of text) of each document."""
    sets = read_document_sets(prefix, count)
    return [(sets.names[place], size) for place, size in sets.rows.tolist()]


def sets_of(items, key="text"):
    """What `read_sets` returns for the dataset of these documents."""
    return [(item["meta"]["pile_set_name"], len(item[key].encode())) for item in items]


def options(inputs, prefix, *more):
    """Arguments of preprocess-data with a tokenizer of bytes."""
    return ["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer-type", "NullTokenizer", *more]


def run(inputs, prefix, *more):
    """Run preprocess-data in this process; return its exit code."""
    return preprocess_data.main(options(inputs, prefix, "--append-eod", *more))


def start(command, python_path="", **more):
    """Start a command in the repository; `python_path` is a folder of modules that it finds first."""
    environment = {**os.environ, "PYTHONPATH": f"{python_path}:{ROOT}"}
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def mpi(ranks, arguments, **more):
    """Start preprocess-data on ranks."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    command = [mpiexec, "-n", ranks, sys.executable, "tools/preprocess_data.py", *arguments]
    return start(command, start_new_session=True, **more)
