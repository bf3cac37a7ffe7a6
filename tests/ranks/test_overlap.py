"""Nothing reads a message that has not arrived: with messages that arrive as late as possible, a run is the same."""

from unittest.mock import patch

import pytest
import torch

from megatron_tf.parallel import collectives
from tests.support.layouts import layout_config
from tests.support.training import training_run


class Late(collectives.Pending):
    """A result that is NaN until the rank waits for it."""

    def __init__(self, work, received, **options):
        if work is not None:
            work.wait()
            self.arrived = received.clone()
            received.fill_(torch.nan)
        self.is_late = work is not None
        super().__init__(None, received, **options)

    def wait(self):
        if self.is_late:
            self.received.copy_(self.arrived)
            self.is_late = False
        return super().wait()


def late_run(mesh, config):
    with patch.object(collectives, "Pending", Late):
        return training_run(mesh, config, 3)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize(
    ("layout", "chunks"), [((2, 1, 1), 1), ((2, 1, 1), 3), ((2, 2, 2), 1), ((4, 1, 2), 2)], ids=str
)
def test_late_messages_change_no_bit(rank_pool, layout, chunks, sequence_parallel, recompute):
    training, parallel = {"recompute_granularity": recompute}, {"tp_comm_overlap_chunks": chunks}
    config = layout_config(layout, sequence_parallel, training=training, parallel=parallel)
    usual, late = (rank_pool.run(run, *layout, config, *extra) for run, extra in ((training_run, (3,)), (late_run, ())))
    for (steps, gradients), (late_steps, late_gradients) in zip(usual, late, strict=True):
        assert late_steps == steps
        assert gradients.keys() == late_gradients.keys()
        assert all((gradients[name] == late_gradients[name]).all() for name in gradients)
