"""Perplexity and bits per byte of the documents of a dataset, by the set that they come from."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_tf.data.bad_ids import check_ids
from megatron_tf.data.document_sets import read_document_sets
from megatron_tf.data.indexed_dataset import IndexedDataset
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.scoring import Request, rolling_windows, score

_GROUP = 256  # windows that are sorted into batches together


@dataclass
class Prediction:
    """The accumulated negative log-likelihood of documents."""

    documents: int = 0
    tokens: int = 0
    """Predicted tokens that count: all but ends of documents, or those of answers."""
    text_bytes: int = 0
    """Bytes of their text in UTF-8."""
    nats: float = 0.0
    """Negative log-likelihood."""

    def add(self, other: "Prediction") -> None:
        """Add the counts of another prediction."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.nats += other.nats

    def summary(self) -> dict[str, Any]:
        """Return counts, nats per token, perplexity and bits per byte; None instead of a division by zero."""
        loss = self.nats / self.tokens if self.tokens else None
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "nats_per_token": loss,
            "perplexity": None if loss is None else _exp(loss),
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes if self.text_bytes else None,
        }


class Document(NamedTuple):
    """One document of a dataset."""

    set_name: str
    ids: Sequence[int]
    """Its ids, without the end of the document."""
    text_bytes: int
    """Bytes of the text of the ids that count."""
    counts: Sequence[bool] | None = None
    """Which of the ids count; None: all."""


def read_tokenized(
    dataset: IndexedDataset,
    documents: range,
    *,
    mask: IndexedDataset | None,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> Iterator[Document]:
    """Yield a range of documents with their set and bytes; of those of a loss mask, only its targets count.

    If these are not recorded (data of other tools), the set is the dataset's name, and the bytes are those of the
    decoded text. Raises DataError for ids outside the model's vocabulary.
    """
    sets = read_document_sets(dataset.prefix, len(dataset))
    for i in documents:
        ids = np.asarray(dataset.document(i), dtype=np.int64)
        check_ids(ids, vocab_size, prefix=dataset.prefix, document=i)
        kept = ids[: len(ids) - int(len(ids) > 0 and int(ids[-1]) == tokenizer.eod)].tolist()
        name = dataset.prefix.name if sets is None else sets.names[int(sets.rows["set"][i])]
        if mask is not None:
            counts = (mask.document(i)[: len(kept)] != 0).tolist()
            answers = list(itertools.compress(kept, counts))
            yield Document(set_name=name, ids=kept, text_bytes=_text_bytes(tokenizer, answers), counts=counts)
        elif sets is None:
            yield Document(name, kept, _text_bytes(tokenizer, kept))
        else:
            yield Document(name, kept, int(sets.rows["text_bytes"][i]))


def _text_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    return len(tokenizer.decode(ids).encode())


def predict_documents(
    model: LanguageModel,
    documents: Iterator[Document],
    *,
    eod: int,
    window: int,
    stride: int,
    batch_size: int | None,
    progress: Callable[[int], object],
) -> dict[str, Prediction]:
    """Score documents independently, each after an end of document, and return the totals by set.

    For `window` and `stride`, see `rolling_windows`. `progress` receives the number of tokens predicted since its last
    call.
    """
    predictions: dict[str, Prediction] = {}

    def windows() -> Iterator[tuple[str, Request]]:
        for document in documents:
            of_set = predictions.setdefault(document.set_name, Prediction())
            of_set.add(Prediction(documents=1, text_bytes=document.text_bytes))
            counts = None if document.counts is None else [False, *document.counts]
            for request in rolling_windows([eod, *document.ids], window=window, stride=stride, counts=counts):
                yield document.set_name, request

    stream = windows()
    while group := list(itertools.islice(stream, _GROUP)):
        requests = [request for _, request in group]
        for i, (log_likelihood, _) in score(model, requests, batch_size):
            scored, counts = requests[i].num_scored, requests[i].counts
            tokens = scored if counts is None else sum(counts)
            predictions[group[i][0]].add(Prediction(tokens=tokens, nats=-log_likelihood))
            progress(scored)
    return predictions


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
