"""Whether all ranks are of one run: the same job, configuration, code and data."""

import hashlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

import megatron_tf
from megatron_tf.config import ConfigError, RunConfig, to_dict
from megatron_tf.data.build import parse_data_path
from megatron_tf.parallel.launch import job_name

_WHOLE_BYTES = 64 << 20  # files up to this are read whole, of others as many blocks
_BLOCKS = 64
_INDEX_BLOCK, _DATA_BLOCK = 256 << 10, 64 << 10
_LISTED = 3  # keys that a message names

DataIdentity = dict[str, Any]


def data_identities(config: RunConfig) -> list[DataIdentity]:
    """What tells each training set from others of its name: size and hash of its index, and of its tokens the size and
    the hash of blocks from all over the file. Empty for a set that is missing."""
    return [_identify(prefix) for prefix in parse_data_path(config.data.data_path)[1]]


def check_same_run(
    store: dist.Store, rank: int, num_ranks: int, *, config: RunConfig, data: Sequence[DataIdentity]
) -> None:
    """Raise ConfigError on every rank, naming ranks, keys and both values, where one is of another job, configuration,
    code or data than the first. Every rank calls it."""
    if store.add(f"run/joined/{rank}", 1) > 1:
        raise ConfigError(f"two processes are rank {rank} of this run: another job uses the same MASTER_PORT")
    mine = _facts(config, data)
    if rank == 0:
        store.set("run/facts", json.dumps(mine))
        verdicts = [json.loads(store.get(f"run/verdict/{other}")) for other in range(1, num_ranks)]
        # none before all are there: the first rank keeps the store, and the others are to read this
        store.set("run/summary", "; ".join([verdict for verdict in verdicts if verdict][:_LISTED]))
    else:
        first = json.loads(store.get("run/facts"))
        differences = list(_differences(first, json.loads(json.dumps(mine))))
        store.set(f"run/verdict/{rank}", json.dumps(_verdict(rank, differences)))
    summary = store.get("run/summary").decode()
    store.add("run/read", 1)
    if not summary:
        return
    if rank == 0:
        _wait_for_readers(store, num_ranks)
    raise ConfigError(f"the ranks are not of one run: {summary}: start all of them with the same command and data")


def _wait_for_readers(store: dist.Store, num_ranks: int) -> None:
    """Until every rank has read why the run ends; those that do not come in 5 s have ended."""
    deadline = time.monotonic() + 5.0
    while store.add("run/read", 0) < num_ranks and time.monotonic() < deadline:
        time.sleep(0.05)


def _facts(config: RunConfig, data: Sequence[DataIdentity]) -> dict[str, Any]:
    sets = dict(zip(config.data.data_path, data, strict=True))
    facts = {"job": job_name(), "code": _code_version(), "config": flatten(to_dict(config)), "data": sets}
    return {**facts, "missing": list(_missing_files(config))}


def _missing_files(config: RunConfig) -> Iterator[str]:
    """Files of the data and of the tokenizer, with their keys, that this rank does not see."""
    data = config.data
    for key in ("data_path", "valid_data_path"):
        for prefix in parse_data_path(getattr(data, key) or [])[1]:
            for path in (f"{prefix}.idx", f"{prefix}.bin"):
                if not Path(path).is_file():
                    yield f"data.{key}: {path}"
    if data.tokenizer_model is not None and not data.tokenizer_model.is_file():
        yield f"data.tokenizer_model: {data.tokenizer_model}"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by "section.key"; sections that are lists stay whole."""
    values: dict[str, Any] = {}
    for section, keys in config.items():
        if isinstance(keys, Mapping):
            values |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            values[section] = keys
    return values


def _differences(first: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """What this rank has and rank 0 has not."""
    if mine["job"] != first["job"]:
        yield f"it is of job {mine['job'] or 'none'}, and rank 0 of {first['job'] or 'none'}"
    for key in sorted({*first["config"], *mine["config"]}):
        here, there = mine["config"].get(key), first["config"].get(key)
        if here != there:
            yield f"{key} is {here!r}, and {there!r} on rank 0"
    if mine["code"] != first["code"]:
        yield f"megatron_tf has code {mine['code']}, and {first['code']} on rank 0"
    for file in sorted({*first["missing"], *mine["missing"]}):
        if file not in first["missing"]:
            yield f"{file} is missing, and is there on rank 0"
        elif file not in mine["missing"]:
            yield f"{file} is there, and missing on rank 0"
    for entry, identity in mine["data"].items():
        there = first["data"].get(entry, identity)
        if identity and there and identity != there:
            yield f"data.data_path {entry!r} is other data than on rank 0"


def _verdict(rank: int, differences: Sequence[str]) -> str:
    if not differences:
        return ""
    more = len(differences) - _LISTED
    listed = ", ".join(differences[:_LISTED]) + (f", and {more} more" if more > 0 else "")
    return f"rank {rank} (host {socket.gethostname()}): {listed}"


def _code_version() -> str:
    """A hash of this package's Python files."""
    root = Path(megatron_tf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _identify(prefix: str) -> DataIdentity:
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not (index.is_file() and data.is_file()):
        return {}
    return {
        "index_bytes": index.stat().st_size,
        "index": _digest(index, _INDEX_BLOCK, _WHOLE_BYTES),
        "data_bytes": data.stat().st_size,
        "data": _digest(data, _DATA_BLOCK, _BLOCKS * _DATA_BLOCK),
    }


def _digest(path: Path, block: int, whole: int) -> str:
    """The hash of a file of up to `whole` bytes, or of blocks from its beginning to its end."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if size <= whole:
            for part in iter(partial(file.read, 1 << 20), b""):
                digest.update(part)
        else:
            for number in range(_BLOCKS):
                file.seek((size - block) * number // (_BLOCKS - 1))
                digest.update(file.read(block))
    return digest.hexdigest()
