"""Computes items in a thread before they are needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
        pending = deque(thread.submit(next, source, None) for _ in range(depth))
        while (item := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, source, None))
            yield item

    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=initializer) as thread:
        yield results()


@contextmanager
def mapped_ahead(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[Iterator[R]]:
    """Provide an iterator over the results of `function`, in the order of the items; `threads` compute them at once.

    Items are taken by the thread that iterates. The threads have ended when the context ends.
    """

    def results() -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    with ThreadPoolExecutor(threads, thread_name_prefix="mapped") as pool:
        yield results()
