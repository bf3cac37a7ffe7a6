"""Items that a thread computes ahead."""

import threading

import pytest

from megatron_tf.ahead import computed_ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


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
