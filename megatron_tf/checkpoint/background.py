"""Saving while training continues: a save stalls for the copy to host memory, and a thread writes it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.save import Tensors


class BackgroundSaver:
    """Runs one save at a time on every rank of `process_group`, which nothing else may use; a context that waits.

    `on_saved` gets the directory of each checkpoint, `on_failure` the reason of a save that failed, as soon as it is
    known, both in the writing thread. A failed save raises CheckpointError at the next `save` or `wait`, on every rank;
    leaving the context after another error does not hide that one.
    """

    def __init__(
        self, process_group: ProcessGroup | None, on_saved: Callable[[Path], None], on_failure: Callable[[str], None]
    ) -> None:
        self.process_group = process_group
        self.on_saved = on_saved
        self.on_failure = on_failure
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.pending: Future[None] | None = None

    def save(self, save: Callable[..., Path], tensors: Tensors) -> None:
        """Start `save(tensors=..., process_group=...)`, which is `save_checkpoint` with its other arguments, once the
        save before is done; `tensors` may change after the call."""
        self.wait()
        copies = {}
        for group, shards in tensors.items():
            # not pinned: torch keeps pinned blocks for the rest of the run, each rounded up to a power of two
            copies[group] = [
                shard.with_tensor(shard.tensor.detach().to("cpu", copy=True)) for shard in shards if shard.is_writer
            ]

        def write() -> None:
            try:
                path = save(tensors=copies, process_group=self.process_group)
            except CheckpointError as error:
                self.on_failure(str(error))
                raise
            self.on_saved(path)

        self.pending = self.thread.submit(write)

    def wait(self) -> None:
        """Until the checkpoint being written is complete. Raises CheckpointError where saving it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self.thread.shutdown()
