"""Items that a thread computes ahead."""

import threading
import time

import pytest

from megatron_tf.ahead import computed_ahead, mapped_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "mapped"))]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 10])
def test_the_items_come_in_order(depth, count):
    with computed_ahead(range(1, count + 1), depth=depth) as items:
        assert list(items) == list(range(1, count + 1))
    assert not threads()


def test_a_thread_is_ahead_by_the_depth():
    computed = []
    third = threading.Event()

    def source():
        for item in range(1, 10):
            computed.append((item, threading.current_thread().name))
            if item == 3:
                third.set()
            yield item

    with computed_ahead(source(), depth=2) as items:
        assert next(items) == 1
        assert third.wait(60)  # computed before it is needed
        assert len(computed) == 3
    assert {name for _, name in computed} == {"ahead_0"}


def test_an_error_of_the_source_is_raised_where_its_item_is_needed():
    def source():
        yield 1
        raise OSError("the disk says no")

    with computed_ahead(source()) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="the disk says no"):
            next(items)


def test_after_an_error_no_thread_is_left_whoever_holds_the_iterator():
    held = []

    def consume():
        with computed_ahead(range(1, 10)) as items:
            held.append(items)
            raise ValueError(f"at {next(items)}")

    with pytest.raises(ValueError, match="at 1") as caught:
        consume()
    assert caught.tb, "the error keeps the frames"
    assert not threads()


def test_the_initializer_runs_in_the_thread():
    found = []
    with computed_ahead([1], initializer=lambda: found.append(threading.current_thread().name)) as items:
        assert list(items) == [1]
    assert found == ["ahead_0"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_the_order_of_their_items_whichever_is_ready_first(number, count):
    def slower_if_even(item):
        time.sleep(0.01 * (item % 2 == 0))
        return -item

    with mapped_ahead(slower_if_even, range(count), threads=number) as results:
        assert list(results) == [-item for item in range(count)]
    assert not threads()


def test_as_many_are_computed_at_once_as_there_are_threads():
    together = threading.Barrier(2, timeout=60)

    def meet(item):
        together.wait()  # raises BrokenBarrierError alone
        return item

    with mapped_ahead(meet, range(6), threads=2) as results:
        assert list(results) == list(range(6))


def test_results_before_an_error_are_delivered():
    with mapped_ahead(lambda item: 6 // item, [3, 2, 0, 1], threads=2) as results:
        assert [next(results), next(results)] == [2, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)
    assert not threads()
