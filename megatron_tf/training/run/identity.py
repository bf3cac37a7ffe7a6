"""Check that all ranks belong to one run: the same job, configuration, code and data."""

import hashlib
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_tf
from megatron_tf.config import ConfigError, RunConfig, parse_data_path, to_dict
from megatron_tf.data.build import training_prefixes
from megatron_tf.data.content import Content, content_of
from megatron_tf.parallel.launch import job_name

_LISTED = 3  # keys listed in a message


def data_identities(config: RunConfig) -> dict[str, Content]:
    """Identify the content of each training set of any phase by its prefix; the identity of a missing set is empty."""
    return {prefix: content_of(prefix) for _, prefix in training_prefixes(config.data)}


def check_same_run(
    store: dist.Store, rank: int, num_ranks: int, *, config: RunConfig, data: Mapping[str, Content]
) -> None:
    """Check that every rank has the job, configuration, code and data of rank 0. Collective.

    Raises ConfigError on every rank otherwise, naming ranks, keys and both values.
    """
    if store.add(f"run/joined/{rank}", 1) > 1:
        raise ConfigError(f"two processes are rank {rank} of this run: another job uses the same MASTER_PORT")
    mine = _facts(config, data)
    if rank == 0:
        store.set("run/facts", json.dumps(mine))
        verdicts = [json.loads(store.get(f"run/verdict/{other}")) for other in range(1, num_ranks)]
        # after all verdicts: rank 0 hosts the store, and the others have to read the summary
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
    raise ConfigError(f"the ranks do not belong to one run: {summary}: start all with the same command and data")


def _wait_for_readers(store: dist.Store, num_ranks: int) -> None:
    """Wait until every rank has read why the run ends; ranks that do not within 5 s have exited."""
    deadline = time.monotonic() + 5.0
    while store.add("run/read", 0) < num_ranks and time.monotonic() < deadline:
        time.sleep(0.05)


def _facts(config: RunConfig, data: Mapping[str, Content]) -> dict[str, Any]:
    facts = {"job": job_name(), "code": _code_version(), "config": flatten(to_dict(config)), "data": data}
    return {**facts, "missing": list(_missing_files(config))}


def _missing_files(config: RunConfig) -> Iterator[str]:
    """Yield the data and tokenizer files, with their keys, that do not exist for this rank."""
    data = config.data
    validation = [("data.valid_data_path", prefix) for prefix in parse_data_path(data.valid_data_path or [])[1]]
    for key, prefix in [*training_prefixes(data), *validation]:
        for path in (f"{prefix}.idx", f"{prefix}.bin"):
            if not Path(path).is_file():
                yield f"{key}: {path}"
    if data.tokenizer_model is not None and not data.tokenizer_model.is_file():
        yield f"data.tokenizer_model: {data.tokenizer_model}"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration to values by "section.key"; sections that are lists stay whole."""
    values: dict[str, Any] = {}
    for section, keys in config.items():
        if isinstance(keys, Mapping):
            values |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            values[section] = keys
    return values


def _differences(first: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[str]:
    """Describe how this rank differs from rank 0."""
    if mine["job"] != first["job"]:
        yield f"it belongs to job {mine['job'] or 'none'}, rank 0 to {first['job'] or 'none'}"
    for key in sorted({*first["config"], *mine["config"]}):
        here, there = mine["config"].get(key), first["config"].get(key)
        if here != there:
            yield f"{key} is {here!r}, but {there!r} on rank 0"
    if mine["code"] != first["code"]:
        yield f"megatron_tf has code {mine['code']}, but {first['code']} on rank 0"
    for file in sorted({*first["missing"], *mine["missing"]}):
        if file not in first["missing"]:
            yield f"{file} is missing, but exists on rank 0"
        elif file not in mine["missing"]:
            yield f"{file} exists, but is missing on rank 0"
    for entry, identity in mine["data"].items():
        there = first["data"].get(entry, identity)
        if identity and there and identity != there:
            yield f"data.data_path {entry!r} has other content than on rank 0"


def _verdict(rank: int, differences: Sequence[str]) -> str:
    if not differences:
        return ""
    more = len(differences) - _LISTED
    listed = ", ".join(differences[:_LISTED]) + (f", and {more} more" if more > 0 else "")
    return f"rank {rank} (host {socket.gethostname()}): {listed}"


def _code_version() -> str:
    """Return a hash of this package's Python files."""
    root = Path(megatron_tf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
