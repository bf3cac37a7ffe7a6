"""Ends of documents within a sample, against a slow reference with a mask of S x S."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.data.batch import DocumentMasking, document_lengths, document_starts, make_batch
from megatron_tf.kernels.adapters import sdpa
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.documents import AttendEach, AttendTogether
from megatron_tf.layers.dropout import Dropout
from megatron_tf.model.parallelize import initialize, parameter_shards
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.mesh import Mesh
from tests.support.training import EOD, STRONG, small_run

IDS = torch.tensor([[3, EOD, 5, 6, EOD, EOD, 8, 9], [1, 2, 3, 4, 5, 6, 7, EOD], [EOD, 1, 1, EOD, 2, 2, 2, 2]])


def small_model(keys=()):
    config = parse_config(ModelConfig, vars(small_run(model=dict(keys)).model), "test")
    model = TokenFormer(config, dtype=torch.float64).to(torch.float64)
    initialize(parameter_shards(model, mesh=Mesh(torch.device("cpu"))), config, 1)
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


def options_of(ids):
    """What the model takes for the documents of these samples."""
    starts = np.array(slow_starts(ids))
    return {"document_starts": torch.from_numpy(starts), "document_lengths": torch.from_numpy(document_lengths(starts))}


def test_lengths_are_those_of_runs_of_starts():
    generator = np.random.default_rng(0)
    for samples, length, most in ((1, 1, 1), (5, 64, 3), (4, 33, 33)):
        ids = generator.integers(EOD - most, EOD + 1, (samples, length))
        starts = document_starts(ids, EOD)
        found = document_lengths(starts)
        expected = [np.unique(row, return_counts=True)[1].tolist() for row in starts]
        assert [[*filter(None, row)] for row in found.tolist()] == expected
        assert (found.sum(1) == length).all()
        assert found.shape[1].bit_count() == 1


def test_starts_and_targets():
    ids = np.stack([np.pad(IDS.numpy(), ((0, 0), (0, 1)), constant_values=EOD)] * 2)
    numbers = np.arange(6).reshape(2, 3)
    batch = make_batch(ids, numbers, DocumentMasking(EOD, mask_loss=True, reset_attention=True))
    assert batch.document_starts.tolist() == [slow_starts(IDS)] * 2
    assert batch.document_lengths.tolist() == [[[2, 3, 1, 2], [8, 0, 0, 0], [1, 3, 4, 0]]] * 2
    assert batch.document_lengths.dtype == torch.int32
    assert batch.ignored.tolist() == [(IDS == EOD).tolist()] * 2
    assert batch.num_targets == 2 * int((IDS != EOD).sum())
    plain = make_batch(ids, numbers, DocumentMasking(EOD))
    assert (plain.num_targets, plain.ignored, plain.document_starts) == (2 * IDS.numel(), None, None)
    assert plain.document_lengths is None


@pytest.mark.parametrize("keys", [{}, STRONG], ids=["tokenformer", "strong transformer"])
def test_documents_give_what_they_give_alone(keys):
    """Logits of every token equal those of its document run by itself."""
    model = small_model(keys)
    with torch.no_grad():
        together = model(IDS, **options_of(IDS)).transpose(0, 1)
        for b, (row, starts) in enumerate(zip(IDS, slow_starts(IDS), strict=True)):
            for start in sorted(set(starts)):
                members = [i for i, s in enumerate(starts) if s == start]
                alone = model(row[members][None])[:, 0]
                torch.testing.assert_close(together[b, members], alone, rtol=1e-12, atol=1e-12)
        assert (model(IDS).transpose(0, 1) - together).abs().max() > 1e-3


def varlen_of_torch(q, k, v, bounds, longest):
    """Attention of many sequences, one by one, as flash attention gets them: with empty ones among them."""
    assert bounds.dtype == torch.int32
    assert (int(bounds[0]), int(bounds[-1])) == (0, len(q))
    sizes = bounds.diff().tolist()
    assert max(sizes) <= longest
    pieces = zip(*(t.split(sizes) for t in (q, k, v)), strict=True)
    return torch.cat([sdpa(*(t[:, None] for t in piece))[:, 0] for piece in pieces if len(piece[0])])


def test_gradients_equal_those_of_a_mask():
    """Attention within documents against one with a block-diagonal mask, forward and backward."""
    options = options_of(IDS)
    starts = options["document_starts"]
    allowed = (starts[:, :, None] == starts[:, None, :]).tril()[:, None]

    def masked(q, k, v, documents):
        assert documents.starts is starts
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).permute(2, 0, 1, 3)

    gradients = []
    for attend_documents in (AttendEach(), AttendTogether(varlen_of_torch), masked):
        model = small_model()
        model.use(Kernels(attend_documents=attend_documents))
        model(IDS, **options).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    *found, expected = gradients
    for name, gradient in expected.items():
        for each in found:
            torch.testing.assert_close(each[name], gradient, rtol=1e-10, atol=1e-12)


def test_the_model_reads_nothing_back_from_its_device():
    """On the meta device, where no value can be read: the host does not wait for what a device has yet to compute."""
    with torch.device("meta"):
        model = TokenFormer(parse_config(ModelConfig, vars(small_run().model), "test"))
    model.dropout = Dropout(hidden_rate=0.1, attention_rate=0.1, seed=1)
    numbers = torch.arange(len(IDS), device="meta")
    options = {name: option.to("meta") for name, option in options_of(IDS).items()}
    assert model(IDS.to("meta"), sample_numbers=numbers, **options).shape == (8, 3, 104)

    model.dropout = None
    model.use(Kernels(attend_documents=AttendTogether(lambda q, k, v, bounds, longest: q)))
    assert model(IDS.to("meta"), **options).shape == (8, 3, 104)

    model.use(Kernels())  # a call for each document: the host knows their lengths
    options["document_lengths"] = options_of(IDS)["document_lengths"]
    assert model(IDS.to("meta"), **options).shape == (8, 3, 104)
