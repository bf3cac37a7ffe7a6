"""For which numbers of tokens growth by zero keys changes no bit on a CPU in fp32, and how little it is otherwise."""

import pytest
import torch

from megatron_tf.inference.model import load_model
from tests.support.conversion import save_small_model
from tools import reshard_checkpoint

EXACT = [
    *(("l2_norm_gelu", old, new) for old, new in ((8, 9), (24, 40), (40, 75), (104, 150), (128, 256))),
    *(("gelu_l2_norm", old, new) for old, new in ((32, 33), (64, 100), (96, 150), (160, 321))),
]
OTHERS = [("l2_norm_gelu", 28, 40), ("l2_norm_gelu", 100, 150), ("gelu_l2_norm", 28, 41), ("gelu_l2_norm", 112, 208)]


def difference(folder, norm, old, new):
    """(largest difference of the logits after growth, largest logit)."""
    tokens = {f"{kind}_tokens": old for kind in ("qkv", "proj", "ffn")}
    before = save_small_model(folder, hidden_size=64, norm_activation=norm, **tokens)
    grow = f"qkv={new},proj={new},ffn={new}"
    assert reshard_checkpoint.main(["--load", str(before), "--save", str(folder / "grown"), "--grow", grow]) == 0
    ids = torch.randint(60, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, grown = load_model(before)(ids), load_model(folder / "grown")(ids)
    return float((logits - grown).abs().max()), float(logits.abs().max())


@pytest.mark.parametrize(("norm", "old", "new"), EXACT)
def test_growth_from_these_numbers_changes_no_bit(tmp_path, norm, old, new):
    assert difference(tmp_path, norm, old, new)[0] == 0


@pytest.mark.parametrize(("norm", "old", "new"), OTHERS)
def test_growth_from_other_numbers_stays_within_rounding(tmp_path, norm, old, new):
    moved, largest = difference(tmp_path, norm, old, new)
    assert moved <= 5e-6 * largest
