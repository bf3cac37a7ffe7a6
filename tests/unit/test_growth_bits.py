"""From which numbers of tokens growth by zero keys changes no bit on a CPU in fp32, and how little it is otherwise."""

from pathlib import Path

import pytest
import torch

from megatron_tf.commands import reshard_checkpoint
from megatron_tf.inference.model import load_model
from megatron_tf.kernels.row_product import MAX_ROWS, DecodingKernels
from megatron_tf.layers.pattention import Pattention
from tests.support.conversion import save_small_model

EXACT = [
    *(("l2_norm_gelu", old, new) for old, new in ((8, 9), (24, 40), (40, 75), (104, 150), (128, 256))),
    *(("gelu_l2_norm", old, new) for old, new in ((32, 33), (64, 100), (96, 150), (160, 321))),
    *(("l2_norm_gelu", old, new) for old, new in ((4, 5), (7, 100), (28, 40), (33, 34), (100, 150), (129, 515))),
    *(("gelu_l2_norm", old, new) for old, new in ((5, 9), (28, 41), (49, 50), (100, 150), (112, 208), (255, 300))),
]
OTHERS = [("l2_norm_gelu", 3, 40), ("l2_norm_gelu", 2, 3), ("gelu_l2_norm", 3, 41)]


ROUNDING = 5e-6  # of the largest logit


def blas_keeps_bits():
    """Whether MKL sums a prefix of tokens in the same order whatever follows: on Intel's CPUs, in blocks as ours."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "GenuineIntel" in cpu.read_text()


def grown(folder, norm, old, new):
    """The models before and after growth."""
    tokens = {f"{kind}_tokens": old for kind in ("qkv", "proj", "ffn")}
    before = save_small_model(folder, hidden_size=64, norm_activation=norm, **tokens)
    grow = f"qkv={new},proj={new},ffn={new}"
    growth = ["--grow", grow, "--growth-init", "zero_key"]
    assert reshard_checkpoint.main(["--load", str(before), "--save", str(folder / "grown"), *growth]) == 0
    return load_model(before), load_model(folder / "grown")


def difference(models, length):
    """(largest difference of the logits of two texts, largest logit)."""
    ids = torch.randint(60, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, after = (model(ids) for model in models)
    return float((logits - after).abs().max()), float(logits.abs().max())


@pytest.mark.parametrize(("norm", "old", "new"), EXACT)
def test_growth_from_four_tokens_on_changes_no_bit(tmp_path, norm, old, new):
    models = grown(tmp_path, norm, old, new)
    allowed = 0 if blas_keeps_bits() else ROUNDING
    for length in (1, 2, 33):
        moved, largest = difference(models, length)
        assert moved <= allowed * largest
    for model in models:
        model.arrange_for_decoding()
    assert [difference(models, length)[0] for length in (1, 2)] == [0, 0]  # the products of a few rows are ours
    moved, largest = difference(models, 33)
    assert moved <= allowed * largest


@pytest.mark.parametrize(("norm", "old", "new"), OTHERS)
def test_growth_from_fewer_tokens_stays_within_rounding(tmp_path, norm, old, new):
    moved, largest = difference(grown(tmp_path, norm, old, new), 33)
    assert moved <= ROUNDING * largest


def pattention_of(keys, values, norm, is_for_decoding):
    layer = Pattention(keys.shape[1], values.shape[1], num_tokens=len(keys), norm_activation=norm)
    layer.key_tokens.copy_(keys)
    layer.value_tokens.copy_(values)
    layer.tau = 5.0
    if is_for_decoding:
        layer.use(DecodingKernels())
    return layer


@torch.no_grad()
@pytest.mark.parametrize("is_for_decoding", [False, True])
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_pattention_of_any_number_of_tokens_keeps_every_bit(norm, is_for_decoding):
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for _ in range(100):
        old, more, width, rows = draw(4, 300), draw(1, 400), 32 * draw(1, 5), (2, 8, 9, 70)[draw(0, 4)]
        keys, values, x = (torch.randn(count, width, generator=generator) for count in (old, old + more, rows))
        before = pattention_of(keys, values[:old], norm, is_for_decoding)
        after = pattention_of(torch.cat([keys, torch.zeros(more, width)]), values, norm, is_for_decoding)
        if blas_keeps_bits() or (is_for_decoding and rows <= MAX_ROWS[torch.float32]):
            assert torch.equal(before(x), after(x)), (old, more, width, rows)
        else:
            exact = [layer.double()(x.double()) for layer in (before, after)]  # rows of tiny scores amplify rounding
            torch.testing.assert_close(*exact, rtol=1e-9, atol=1e-9)
