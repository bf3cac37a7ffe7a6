"""Preprocessing on a disk that is full again and again."""

import errno
from collections.abc import Callable

import pytest

from megatron_tf.data import documents, preprocess


class FullDisk:
    """A disk with room for a few appended batches at each attempt; what follows is half written, and fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, batches: int) -> None:
        """Make batches and commits small, so that there are many."""
        self.batches = self.room = batches
        monkeypatch.setattr(preprocess, "COMMIT_BYTES", 3_000)
        monkeypatch.setattr(documents, "BATCH_BYTES", 2_000)
        append = preprocess.Part.append

        def append_while_there_is_room(part, *batch, mask):
            self.room -= 1
            if self.room < 0:
                part._files.setdefault("text", part._open("text"))[0].write(b"half written")
                raise OSError(errno.ENOSPC, "No space left on device")
            append(part, *batch, mask=mask)

        monkeypatch.setattr(preprocess.Part, "append", append_while_there_is_room)

    def attempts(self, command: Callable[[], int]) -> int:
        """Run a command until it succeeds, with room for some more batches each time; return the number of runs."""
        for attempt in range(1, 200):
            self.room = self.batches
            if command() == 0:
                return attempt
        raise AssertionError("the work that was done is done again")
