"""What the catcher of signals leaves to others."""

import multiprocessing
import os
import signal

from megatron_tf.training.supervision.signals import STOP_SIGNALS, SignalCatcher


def test_a_forked_worker_can_be_terminated():
    with SignalCatcher() as catcher:
        context = multiprocessing.get_context("fork")
        ready, never = context.Event(), context.Event()
        worker = context.Process(target=lambda: (ready.set(), never.wait(60)))
        worker.start()
        assert ready.wait(30)
        worker.terminate()
        worker.join(10)
        ended, code = not worker.is_alive(), worker.exitcode
        worker.kill()
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended
    assert code == -signal.SIGTERM
    assert catcher.number == signal.SIGTERM, "the parent process still catches it"


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with SignalCatcher():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
