"""Losses that jump are told from losses that wander."""

import json
import math
import random
from dataclasses import asdict

from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.checkpoint.run_state import SpikeHistory
from megatron_tf.training.run.spikes import SpikeDetector


def wandering(steps, seed=0):
    generator = random.Random(seed)
    return [5.0 - 0.01 * i + generator.gauss(0.0, 0.05) for i in range(steps)]


def test_a_falling_noisy_loss_has_no_spikes():
    for seed in range(20):
        detector = SpikeDetector(8.0)
        assert not any(detector.is_spike(loss) for loss in wandering(200, seed))


def test_a_jump_is_told_and_does_not_move_the_scale():
    detector = SpikeDetector(8.0)
    for loss in wandering(100):
        detector.is_spike(loss)
    assert [detector.is_spike(loss) for loss in (7.0, 7.0, 4.0, 7.0)] == [True, True, False, True]
    assert detector.in_a_row == 1


def test_a_level_loss_makes_no_spike_of_a_ripple():
    detector = SpikeDetector(8.0)
    assert not any(detector.is_spike(2.0) for _ in range(50))
    assert not detector.is_spike(2.05)
    assert detector.is_spike(2.2)


def test_a_loss_that_stays_up_is_no_spike_for_ever():
    detector = SpikeDetector(8.0)
    for loss in wandering(100):
        detector.is_spike(loss)
    told = [detector.is_spike(9.0) for _ in range(400)]
    assert all(told[:100])
    assert not told[100]
    assert not any(told[-50:])


def test_the_first_losses_are_no_spikes():
    assert not any(SpikeDetector(8.0).is_spike(math.exp(i)) for i in range(31))


def test_a_restarted_detector_judges_as_the_one_before():
    def ripple(step):
        return 3.0 + 0.05 * math.sin(7 * step)

    straight, stopped = SpikeDetector(3.0), SpikeDetector(3.0)
    for step in range(40):
        straight.is_spike(ripple(step))
        stopped.is_spike(ripple(step))
    saved = json.loads(json.dumps(asdict(stopped.history())))
    restarted = SpikeDetector(3.0, SpikeHistory.from_json(JsonObject("a file", "run.spikes", saved)))
    later = [5.0, 5.0, ripple(42), 5.0]
    assert [restarted.is_spike(loss) for loss in later] == [straight.is_spike(loss) for loss in later]
    assert restarted.history() == straight.history()
