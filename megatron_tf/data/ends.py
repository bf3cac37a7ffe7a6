"""Whether documents end with the token that a run takes for their end."""

from megatron_tf.data.indexed_dataset import DataError, IndexedDataset

_LOOKED_AT = 256  # documents


def check_ends(dataset: IndexedDataset, eod: int) -> None:
    """Raise DataError where documents were written without this end: no boundary would be found between them."""
    documents = [dataset.document(i) for i in range(min(len(dataset), _LOOKED_AT))]
    if any(len(ids) for ids in documents) and not any((ids == eod).any() for ids in documents):
        last = next(int(ids[-1]) for ids in documents if len(ids))
        raise DataError(
            f"{dataset.prefix}: none of its first documents has the end-of-document id {eod}, the first ends with "
            f"{last}: preprocess it with --append-eod, name that token with data.eod_token, or set "
            f"data.eod_mask_loss and data.reset_attention_mask to false"
        )
