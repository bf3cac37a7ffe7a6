"""One run at a time in a directory of checkpoints: refused while it lives, taken over when it is dead."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_tf.checkpoint import lock
from megatron_tf.checkpoint.lock import LOCK, LockedError, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_tf.checkpoint.lock import RunLock
with RunLock(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(path, **changes):
    """Let the lock be one of another machine."""
    owner = json.loads(path.read_text()) | {"machine": "another boot", "host": "node7"} | changes
    path.write_text(json.dumps(owner))


def test_a_second_run_is_refused_by_name(tmp_path, holder):
    message = rf"checkpoint\.save: another run is writing to {tmp_path} \(process {holder.pid} on "
    with pytest.raises(LockedError, match=message), RunLock(tmp_path, print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_only_a_dead_run_gives_its_lock_away(tmp_path, holder, number):
    """Killed, and not even noticed by its parent; or merely frozen."""
    holder.send_signal(number)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    if number == signal.SIGKILL:
        with RunLock(tmp_path, print):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(LockedError), RunLock(tmp_path, print):
            pass


def test_a_process_number_that_is_used_again_is_not_the_owner(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(lock._this_process()) | {"started": "1"}))
    with RunLock(tmp_path, print):
        pass


def test_a_run_on_another_machine_is_alive_while_it_keeps_its_lock_fresh(tmp_path):
    with RunLock(tmp_path, print):
        elsewhere(tmp_path / LOCK)
        with pytest.raises(LockedError, match="on node7"), RunLock(tmp_path, print):
            pass


@pytest.mark.parametrize("contents", ["a lock of another machine", "", "[1, 2"])
def test_a_lock_that_nobody_keeps_fresh_is_taken_over(tmp_path, contents):
    if contents == "a lock of another machine":
        (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(lock._this_process())))
        elsewhere(tmp_path / LOCK)
    else:
        (tmp_path / LOCK).write_text(contents)
    with RunLock(tmp_path, print):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("contents", ["a lock of another machine", "[1, 2"])
def test_a_wait_for_another_machine_is_announced_with_the_run_that_it_is_for(tmp_path, caplog, contents):
    owner = dataclasses.asdict(lock._this_process()) | {"machine": "another boot", "host": "node7", "job": "41"}
    (tmp_path / LOCK).write_text(json.dumps(owner) if contents != "[1, 2" else contents)
    with RunLock(tmp_path, print):
        pass
    who = f"process {os.getpid()} on node7, job 41" if contents != "[1, 2" else "an unknown process"
    message = f"{tmp_path} is locked by {who}: waiting up to 1 s to see whether that run is alive"
    assert caplog.text.count(message) == 1


def test_a_lock_of_this_machine_needs_no_wait(tmp_path, holder, caplog):
    with pytest.raises(LockedError), RunLock(tmp_path, print):
        pass
    assert caplog.text == ""


def test_what_a_crash_left_of_a_lock_is_removed_and_nothing_else(tmp_path):
    old, now = time.time() - 600, time.time()
    names = {".lock." + "0a" * 16: old, ".lock." + "1b" * 16: now, ".lock.mine": old, ".lockfile": old, "latest": old}
    for name, changed in names.items():
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (changed, changed))
    with RunLock(tmp_path, print):
        assert {path.name for path in tmp_path.iterdir()} == {*names, LOCK} - {".lock." + "0a" * 16}


def test_it_needs_no_links_and_no_flock(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path, print), pytest.raises(LockedError), RunLock(tmp_path, print):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_lock_was_taken_over_is_told(tmp_path):
    told = []
    with RunLock(tmp_path, told.append):
        elsewhere(tmp_path / LOCK, token="another")
        limit = time.monotonic() + 30
        while not told and time.monotonic() < limit:
            time.sleep(0.05)
    assert "another run took over" in told[0]
    assert (tmp_path / LOCK).exists()  # it is not this one's to remove


def test_a_new_lock_that_a_slow_process_took_for_the_dead_one_is_put_back(tmp_path, monkeypatch):
    """Between the renaming of a live lock and its return somebody else finds the name free."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 2.0)
    monkeypatch.setattr(lock, "STALE_SECONDS", 20.0)
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(lock._this_process()) | {"started": "1"}))
    slow, told, outcomes = RunLock(tmp_path, print), [], []
    is_renamed, is_taken = threading.Event(), threading.Event()
    real = os.link

    def link(source, target):
        if threading.current_thread() is thread and reads and not source.name.endswith(holder.owner.token):
            is_renamed.set()
            is_taken.wait(timeout=60)
        real(source, target)

    def third():
        with pytest.raises(LockedError), RunLock(tmp_path, print):
            outcomes.append("held")

    holder, reads = RunLock(tmp_path, told.append), []
    with monkeypatch.context() as patched:

        def read(owner):
            if not reads:
                reads.append(owner)
                holder.__enter__()  # it takes over the dead lock before the slow one renames it
            return False

        thread = threading.Thread(target=slow._remove_if_dead)
        patched.setattr(os, "link", link)
        patched.setattr(lock.Owner, "is_running", property(lambda owner: owner.started != "1" or read(owner)))
        thread.start()
        assert is_renamed.wait(timeout=60)
        newcomer = threading.Thread(target=third)
        newcomer.start()
        time.sleep(0.3)
        is_taken.set()
        thread.join(timeout=60)
        newcomer.join(timeout=60)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == holder.owner.token
    assert outcomes == told == []
    holder.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_lock_one_gets_it(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(lock._this_process()) | {"started": "1"}))
    outcomes, together = [], threading.Barrier(8)
    done = threading.Barrier(8)

    def take():
        together.wait()
        try:
            with RunLock(tmp_path, print):
                outcomes.append("held")
                done.wait(timeout=60)
        except LockedError:
            outcomes.append("refused")
            done.wait(timeout=60)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["held", *["refused"] * 7]


def test_a_lock_that_is_released_while_it_is_examined_is_taken(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps(dataclasses.asdict(lock._this_process())))
    elsewhere(tmp_path / LOCK)
    examine = RunLock._beats

    def released_first(self, text):
        (tmp_path / LOCK).unlink()
        return examine(self, text)

    monkeypatch.setattr(RunLock, "_beats", released_first)
    with RunLock(tmp_path, print):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
