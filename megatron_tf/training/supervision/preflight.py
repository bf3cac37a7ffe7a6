"""Checks before the first step for what would otherwise fail hours later, or on one rank of many."""

import contextlib
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import megatron_tf
from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.parallel.mesh import AXES, Mesh
from megatron_tf.tokenformer.dtypes import parameter_dtype
from megatron_tf.tokenformer.sizes import parameter_count

_CLOCK_SECONDS = 60.0  # tolerated difference of clocks, including the wait for the slowest rank
_VISIBLE_SECONDS = 5.0  # until a file of one host is visible on another
_CHECKPOINTS_AHEAD = 2
_VALUES_PER_PARAMETER = 3  # its value and two Adam moments


def preflight(config: RunConfig, mesh: Mesh) -> list[str]:
    """Check directories, versions, clocks and collectives, and return warnings, the same on every rank. Collective.

    `config` is that of the current growth stage. Raises ConfigError on every rank, naming rank and host, if a rank
    can't write its files, if versions differ, or if a collective over an axis of the mesh gives a wrong sum.
    """
    shared = _SharedDirectory(config.checkpoint.save, mesh)
    mine = {
        "host": socket.gethostname(),
        "errors": [*_unwritable(config, mesh.is_first_rank), *shared.not_seen(), *_wrong_sums(mesh)],
        "warnings": list(_short_of_disk(config)) if mesh.is_first_rank else [],
        "versions": _versions(),
        "clock": time.time(),
    }
    reports = mesh.gather(mine)
    shared.remove()
    errors: list[str] = []
    for rank, report in enumerate(reports):
        found = [*report["errors"], *_differences(reports[0], report)]
        errors += [f"rank {rank} (host {report['host']}): {error}" for error in found]
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ConfigError("; ".join(errors[:3]) + more)
    warnings: list[str] = reports[0]["warnings"]
    return [*warnings, *_clocks(reports)]


def _unwritable(config: RunConfig, is_first_rank: bool) -> Iterator[str]:
    """Yield the keys of paths that this rank has to write but can't."""
    logging = config.logging
    places: list[tuple[str, Path | None, Callable[[Path], None]]] = [
        ("checkpoint.save", config.checkpoint.save, _write_in),
        ("logging.profile_dir", logging.profile_dir, _write_in),
    ]
    if is_first_rank:
        places += [
            ("logging.metrics_file", logging.metrics_file, _append_to),
            ("logging.tensorboard_dir", logging.tensorboard_dir, _write_in),
            ("logging.wandb_save_dir", logging.wandb_save_dir, _write_in),
        ]
    for key, path, probe in places:
        try:
            if path is not None:
                probe(path)
        except OSError as error:
            yield f"{key} can't be written: {error}"


def _write_in(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".writable-{uuid.uuid4().hex}"
    probe.write_bytes(b"x")
    probe.unlink()


class _SharedDirectory:
    """A file that rank 0 writes into `checkpoint.save` and every other rank looks for. Collective."""

    def __init__(self, directory: Path | None, mesh: Mesh) -> None:
        self.directory, self.mesh = directory, mesh
        self.file: Path | None = None
        if directory is None or mesh.world is None:
            return
        file = directory / f".shared-{uuid.uuid4().hex}"
        if mesh.is_first_rank:
            with contextlib.suppress(OSError):  # `_unwritable` reports it
                directory.mkdir(parents=True, exist_ok=True)
                file.touch()
        name = mesh.gather(file.name if mesh.is_first_rank and file.exists() else None)[0]
        if name is not None:
            self.file = directory / name

    def not_seen(self) -> Iterator[str]:
        """Yield an error if this rank does not see the file."""
        if self.file is None:
            return
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not self._is_seen(self.file):
            if time.monotonic() > deadline:
                yield (
                    f"checkpoint.save ({self.directory}) is not the same directory as on rank 0: it has to be on a "
                    f"file system that all hosts share"
                )
                return
            time.sleep(0.1)

    def _is_seen(self, file: Path) -> bool:
        with contextlib.suppress(OSError):
            return file.name in os.listdir(file.parent)  # noqa: PTH208  # listing refreshes the cache of a network file system
        return False

    def remove(self) -> None:
        """Delete the file, once all ranks have looked for it."""
        if self.file is not None and self.mesh.is_first_rank:
            self.file.unlink(missing_ok=True)


def _append_to(file: Path) -> None:
    """Open the file as the run does: it may be writable even if its directory is not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.open("ab").close()


def _wrong_sums(mesh: Mesh) -> Iterator[str]:
    """Yield an error for each axis of the mesh over which an all-reduce gives a wrong sum."""
    for axis in AXES:
        group = mesh.group(axis)
        if group is not None:
            total = torch.tensor([1.0, float(mesh.rank(axis))], device=mesh.device)
            dist.all_reduce(total, group=group)
            size = mesh.size(axis)
            if total.tolist() != [size, size * (size - 1) / 2]:
                yield f"an all-reduce over the {size} ranks of {axis} gives {total.tolist()}"


def _short_of_disk(config: RunConfig) -> Iterator[str]:
    root = config.checkpoint.save
    if root is not None:
        size = _VALUES_PER_PARAMETER * parameter_dtype(config.training.precision).itemsize
        needed = _CHECKPOINTS_AHEAD * size * parameter_count(config.model)
        free = shutil.disk_usage(_existing(root)).free
        if free < needed:
            yield (
                f"{root} has {free / 1e9:,.1f} GB free, the next {_CHECKPOINTS_AHEAD} checkpoints take "
                f"{needed / 1e9:,.1f} GB: make room, or set checkpoint.keep_last"
            )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "megatron_tf": megatron_tf.__version__,
    }


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    for package, version in other["versions"].items():
        if version != first["versions"][package]:
            yield f"{package} is {version}, but {first['versions'][package]} on rank 0"


def _clocks(reports: list[Any]) -> Iterator[str]:
    clocks = [report["clock"] for report in reports]
    apart = max(clocks) - min(clocks)
    if apart > _CLOCK_SECONDS:
        late, early = clocks.index(min(clocks)), clocks.index(max(clocks))
        yield (
            f"clocks differ by {apart:.0f} s between rank {early} (host {reports[early]['host']}) and rank {late} "
            f"(host {reports[late]['host']}): timestamps in logs and time limits are unreliable"
        )
