"""Saving while training goes on: a save stalls for the copy to host memory, and a thread writes it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.parallel.sharding import RowShard


class BackgroundSaver:
    """At most one save at a time, on every rank of `group`, which nothing else may use; a context manager that waits.

    `on_saved` gets the directory of each checkpoint, `on_failure` the reason of a save that failed, as soon as it is
    known, both in the writing thread. A failed save raises CheckpointError at the next `save` or `wait`, on every rank;
    leaving the context after another error does not hide that one.
    """

    def __init__(
        self, group: ProcessGroup | None, on_saved: Callable[[Path], None], on_failure: Callable[[str], None]
    ) -> None:
        self.group = group
        self.on_saved = on_saved
        self.on_failure = on_failure
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.pending: Future[None] | None = None

    def save(
        self,
        root: Path,
        step: int,
        groups: Mapping[str, Sequence[RowShard]],
        record: RunRecord,
        writer_label: str,
        retention: Retention,
    ) -> None:
        """Begin what `save_checkpoint` does, once the save before is done; the arguments may change after the call."""
        self.wait()
        copies = {
            name: [shard.with_tensor(shard.tensor.detach().to("cpu", copy=True)) for shard in shards if shard.writer]
            for name, shards in groups.items()
        }

        def write() -> None:
            try:
                path = save_checkpoint(root, step, copies, record, writer_label, self.group, retention)
            except CheckpointError as error:
                self.on_failure(str(error))
                raise
            self.on_saved(path)

        self.pending = self.writer.submit(write)

    def wait(self) -> None:
        """Until the checkpoint being written is complete. Raises CheckpointError where saving it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self.writer.shutdown()
