"""An id outside the vocabulary ends a run with the same error on every layout: dataset, document and offset."""

import re

import numpy as np
import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import ConfigError
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.training.run.trainer import train
from megatron_tf.training.supervision.signals import SignalCatcher
from tests.support.data import write_data_set
from tests.support.layouts import layout_config

LAYOUTS = [(1, 1, 1), (1, 2, 1), (2, 2, 2), (8, 1, 1)]
VOCAB = 257  # of NullTokenizer


def documents(bad, where):
    """Twenty documents of 40 ids, of which one has a bad id at offset 7."""
    ids = [[(i * 7 + j) % VOCAB for j in range(40)] for i in range(20)]
    ids[where][7] = bad
    return ids


def run_on(layout, data, folder, **training):
    """The configuration of a run that reads every document within its second step."""
    return layout_config(
        layout,
        model={"vocab_size": VOCAB, "num_layers": 2, "num_attention_heads": 8, "hidden_size": 64},
        training={"seq_length": 16, "micro_batch_size": 6, "global_batch_size": 24, "train_iters": 3, **training},
        data={"split": "1,0,0", "data_cache_path": str(folder / "cache"), **data},
        checkpoint={"save": str(folder / "saved")},
    )


def outcome(mesh, config):
    """What a run says when it ends, on one rank."""
    try:
        train(config, mesh, signals=SignalCatcher(), data=[{}], end=lambda reason: None, resumable=None)
    except (DataError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize(
    "layout, bad",
    [*((layout, VOCAB) for layout in LAYOUTS), ((1, 1, 1), -1), ((2, 1, 1), -1), ((1, 1, 2), 2**31 - 1)],
    ids=str,
)
def test_a_bad_id_to_train_on_is_named_alike_by_every_rank(rank_pool, tmp_path, layout, bad):
    prefix = write_data_set(tmp_path / "d", documents(bad, 13), np.int32)
    config = run_on(layout, {"data_path": [str(prefix)]}, tmp_path, eval_interval=0)
    answers = rank_pool.run(outcome, *layout, config)
    assert len(set(answers)) == 1
    assert re.fullmatch(
        rf"DataError: .*/d: document 13 has id {bad} at offset 7, but the model has ids 0 to 256: it was made with "
        rf"another tokenizer, or is damaged; preprocess its text again; .*saved holds the state of step \d",
        answers[0],
    )
    assert CheckpointReader(tmp_path / "saved").step < 3


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_bad_id_to_evaluate_on_is_named_alike_by_every_rank(rank_pool, tmp_path, layout):
    good = write_data_set(tmp_path / "good", documents(3, 13), np.int32)
    prefix = write_data_set(tmp_path / "d", documents(-2, 4), np.int32)
    data = {"data_path": [str(good)], "valid_data_path": [f"1 {good}", f"2 {prefix}"]}
    config = run_on(layout, data, tmp_path, eval_interval=2, eval_iters=3)
    answers = rank_pool.run(outcome, *layout, config)
    assert len(set(answers)) == 1
    assert "/d: document 4 has id -2 at offset 7" in answers[0]
    assert "saved holds the state of step 2" in answers[0]
    assert CheckpointReader(tmp_path / "saved").step == 2
