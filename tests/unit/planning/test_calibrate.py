"""This machine is measured by the trainer's code."""

import pytest
import torch

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.planning.calibrate import CPU, MeasuredMachine
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.memory import rank_peak
from megatron_tf.planning.time import step_time
from megatron_tf.training.dry_run.observed_step import observe_step
from megatron_tf.training.step.state import build_state
from tests.support.training import small_run

MODEL = {"hidden_size": 64, "qkv_tokens": 64, "proj_tokens": 64, "ffn_tokens": 256}
TRAINING = {"seq_length": 64, "global_batch_size": 4, "micro_batch_size": 2}


def test_a_part_is_measured_once_and_a_step_takes_as_long_as_its_parts():
    planned, counter, machine = PlannedLayout(small_run(training=TRAINING), 1), PartCounter(CPU), MeasuredMachine(None)
    layer = machine.part(planned, "layer", 0)
    assert machine.part(planned, "layer", 2) is layer
    assert layer.forward.total > 0
    assert layer.backward.total > 0
    parts = [machine.part(planned, name, 0) for name in ("embedding", "head", "layer", "layer", "layer")]
    found = step_time(planned, machine, counter)
    assert found.compute == pytest.approx(2 * sum(part.forward.total + part.backward.total for part in parts))
    assert found.total == pytest.approx(found.compute + found.update)


UNTIED = {"vocab_size": 20000, "untie_embeddings_and_output_weights": True}
FEW_TOKENS = {"seq_length": 16, "global_batch_size": 1, "micro_batch_size": 1}


@pytest.mark.parametrize(
    ("model", "training"), [(MODEL, TRAINING), (MODEL | UNTIED, FEW_TOKENS)], ids=["in a layer", "in the update"]
)
def test_the_peak_on_a_cpu_is_that_of_a_step_with_values(model, training):
    config = small_run(model=model, training=training)
    real = observe_step(build_state(config, Mesh(torch.device("cpu"))), config).meter.peak
    assert rank_peak(PlannedLayout(config, 1), 0, PartCounter(CPU)).bytes == pytest.approx(real, rel=0.05)
