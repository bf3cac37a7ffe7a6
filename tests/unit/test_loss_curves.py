"""Losses and gradient norms of short runs, as they were when they were last looked at: a refactor changes none.

`python -m tests.unit.test_loss_curves` rewrites them after an intended change.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_tf.parallel.mesh import Mesh
from tests.support.training import PLAIN, STRONG, small_run, training_run

CURVES = Path(__file__).parent.parent / "golden" / "loss_curves.json"
STEPS = 12
RUNS = {
    **{norm: {"model": {"norm_activation": norm}} for norm in ("l2_norm_gelu", "gelu_l2_norm", "softmax")},
    "untied": {"model": {"untie_embeddings_and_output_weights": True}},
    "transformer": {"model": PLAIN},
    "strong transformer": {"model": STRONG},
    "recomputed": {"training": {"recompute_granularity": "full"}},
    "bf16": {"training": {"precision": "bf16"}},
}


def curve(name):
    config = small_run(**{section: dict(keys) for section, keys in RUNS[name].items()})
    return training_run(Mesh(torch.device("cpu")), config, STEPS)[0]


@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_as_it_was(name):
    rounding = 2e-2 if name == "bf16" else 1e-5
    expected = json.loads(CURVES.read_text())[name]
    assert torch.tensor(curve(name)).flatten().tolist() == pytest.approx(
        torch.tensor(expected).flatten().tolist(), rel=rounding
    )


if __name__ == "__main__":
    CURVES.write_text(json.dumps({name: curve(name) for name in RUNS}, indent=1) + "\n")
