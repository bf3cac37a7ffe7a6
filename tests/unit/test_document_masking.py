"""Ends of documents within a sample, against a slow reference with a mask of S x S."""

import numpy as np
import torch
import torch.nn.functional as F

from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.data.batch import DocumentMasking, make_batch
from megatron_tf.layers import attention
from megatron_tf.layers.dropout import Dropout
from megatron_tf.model.parallelize import initialize, parameter_shards
from megatron_tf.model.tokenformer import TokenFormer
from tests.support.training import EOD, small_run

IDS = torch.tensor([[3, EOD, 5, 6, EOD, EOD, 8, 9], [1, 2, 3, 4, 5, 6, 7, EOD], [EOD, 1, 1, EOD, 2, 2, 2, 2]])


def small_model():
    config = parse_config(ModelConfig, vars(small_run().model), "test")
    model = TokenFormer(config, dtype=torch.float64).to(torch.float64)
    initialize(parameter_shards(model), config, 1)
    return model


def slow_starts(ids):
    starts = []
    for row in ids.tolist():
        start, of_row = 0, []
        for position, _ in enumerate(row):
            if position and row[position - 1] == EOD:
                start = position
            of_row.append(start)
        starts.append(of_row)
    return starts


def test_starts_and_targets():
    ids = np.stack([np.pad(IDS.numpy(), ((0, 0), (0, 1)), constant_values=EOD)] * 2)
    numbers = np.arange(6).reshape(2, 3)
    batch = make_batch(ids, numbers, DocumentMasking(EOD, mask_loss=True, reset_attention=True))
    assert batch.document_starts.tolist() == [slow_starts(IDS)] * 2
    assert batch.ignored.tolist() == [(IDS == EOD).tolist()] * 2
    assert batch.num_targets == 2 * int((IDS != EOD).sum())
    plain = make_batch(ids, numbers, DocumentMasking(EOD))
    assert (plain.num_targets, plain.ignored, plain.document_starts) == (2 * IDS.numel(), None, None)


def test_documents_give_what_they_give_alone():
    """Logits of every token equal those of its document run by itself."""
    model = small_model()
    with torch.no_grad():
        together = model(IDS, document_starts=torch.tensor(slow_starts(IDS))).transpose(0, 1)
        for b, (row, starts) in enumerate(zip(IDS, slow_starts(IDS), strict=True)):
            for start in sorted(set(starts)):
                members = [i for i, s in enumerate(starts) if s == start]
                alone = model(row[members][None])[:, 0]
                torch.testing.assert_close(together[b, members], alone, rtol=1e-12, atol=1e-12)
        assert (model(IDS).transpose(0, 1) - together).abs().max() > 1e-3


def test_gradients_equal_those_of_a_mask(monkeypatch):
    """Attention within documents against one with a block-diagonal mask, forward and backward."""
    starts = torch.tensor(slow_starts(IDS))
    allowed = (starts[:, :, None] == starts[:, None, :]).tril()[:, None]

    def masked(documents, attend, qkv):
        q, k, v = (t.permute(1, 2, 0, 3) for t in qkv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).permute(2, 0, 1, 3)

    gradients = []
    for function in (attention._attend_within, masked):
        monkeypatch.setattr(attention, "_attend_within", function)
        model = small_model()
        model(IDS, document_starts=starts).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-12)


def test_the_model_reads_nothing_back_from_its_device():
    """On the meta device, where no value can be read: the host does not wait for what a device has yet to compute."""
    with torch.device("meta"):
        model = TokenFormer(parse_config(ModelConfig, vars(small_run().model), "test"))
    model.dropout = Dropout(hidden_rate=0.0, attention_rate=0.1, seed=1)
    starts = torch.tensor(slow_starts(IDS))
    logits = model(IDS.to("meta"), document_starts=starts, sample_numbers=torch.arange(len(IDS)))
    assert logits.shape == (8, 3, 104)
