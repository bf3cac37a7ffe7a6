"""Computes items in a thread before they are needed."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def computed_ahead(
    items: Iterable[T], *, depth: int = 1, initializer: Callable[[], object] | None = None
) -> Iterator[Iterator[T]]:
    """Provide an iterator over the same items; a thread computes up to `depth` of them, none of which is None, ahead.

    The thread calls `initializer` first, and has ended when the context ends. A generator that owned it would be closed
    whenever it is collected, also in another thread that is just starting, where joining a thread can wait for itself.
    """
    source = iter(items)

    def results() -> Iterator[T]:
        pending = [thread.submit(next, source, None) for _ in range(depth)]
        while (item := pending.pop(0).result()) is not None:
            pending.append(thread.submit(next, source, None))
            yield item

    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=initializer) as thread:
        yield results()
