"""Asynchronous saving: a thread writes the checkpoint, and training stalls at most for the copy to host memory.

Copies from a GPU do not stall it at all.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.save import Tensors
from megatron_tf.checkpoint.snapshot import HostCopies


class BackgroundSaver:
    """Saves checkpoints in a thread, one at a time; leaving the context waits for the current one.

    Every rank of `process_group` must use it, and nothing else may use that group. As soon as a save ends, the writing
    thread calls `on_saved` with the directory or `on_failure` with the reason. A failed save raises CheckpointError at
    the next `save` or `wait`, on every rank. If the context is left because of another error, that one is raised.
    """

    def __init__(
        self, process_group: ProcessGroup | None, on_saved: Callable[[Path], None], on_failure: Callable[[str], None]
    ) -> None:
        self.process_group = process_group
        self.on_saved = on_saved
        self.on_failure = on_failure
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self.copies = HostCopies(self.thread)
        self.pending: Future[None] | None = None

    def save(self, save: Callable[..., Path], tensors: Tensors) -> None:
        """Wait for the previous save, copy `tensors` to host memory and start `save(tensors=..., process_group=...)`.

        `save` is `save_checkpoint` with its other arguments bound; `tensors` may be modified after the call (on a GPU:
        by work of the current stream)."""
        self.wait()
        copies, wait_for_copies = self.copies.take(tensors)

        def write() -> None:
            wait_for_copies()
            try:
                path = save(tensors=copies, process_group=self.process_group)
            except CheckpointError as error:
                self.on_failure(str(error))
                raise
            self.on_saved(path)

        self.pending = self.thread.submit(write)

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete. Raises CheckpointError if saving it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:
                raise
        finally:
            self.thread.shutdown()
            self.copies.close()
