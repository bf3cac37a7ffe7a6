"""A checkpoint's model on one device, or tensor-parallel over the ranks of a group, for evaluation and research."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import choose_decoding_kernels
from megatron_tf.layers.cache import KeyValueCache
from megatron_tf.model.from_checkpoint import read_transformer
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.collectives import all_gather_copy


class LanguageModel(nn.Module):
    """A whole TokenFormer: ids [B, S] -> logits [B, S, V], where V is the padded vocabulary size.

    `config` describes the model; `record` is its checkpoint's record of the run. Only the first `config.vocab_size`
    logits belong to ids of the tokenizer; the others are padding.
    """

    def __init__(self, transformer: TokenFormer, record: RunRecord) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config
        self.record = record
        self.directory: Path | None = None
        """The checkpoint it was loaded from; None if it was not."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Make activations follow the dtype of the parameters after `to`, `half` and similar methods."""
        super()._apply(fn, recurse)
        self.transformer.dtype = self.transformer.embedding.weight.dtype
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the record as in the checkpoint's metadata.json."""
        return self.record.to_json()

    def forward(self, token_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Compute logits [B, S, V] of ids [B, S]; `cache` holds the previous tokens, and these are appended to it."""
        logits: Tensor = self.transformer(token_ids, cache)
        return self._gathered(logits).transpose(0, 1)

    def hidden_states(self, token_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Compute the last layer's output [B, S, D] of ids [B, S], as input for `logits`."""
        return self.transformer.hidden_states(token_ids, cache).transpose(0, 1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Compute logits [B, S, V] of hidden states [B, S, D]; it is expensive, so pass only the positions needed."""
        return self._gathered(self.transformer.logits(hidden_states.transpose(0, 1))).transpose(0, 1)

    def new_cache(self) -> KeyValueCache:
        """Create an empty cache for one batch."""
        return KeyValueCache(self.config.num_layers)

    def arrange_for_decoding(self) -> None:
        """Switch to the kernels that are fastest for decoding on the model's device; call it after moving the model."""
        self.transformer.use(choose_decoding_kernels(self.device))

    @property
    def group(self) -> ProcessGroup | None:
        """Return the group of ranks that share the model; None for a single process."""
        return self.transformer.group

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.transformer.embedding.weight.device

    def _gathered(self, logits: Tensor) -> Tensor:
        return all_gather_copy(logits, -1, self.group)


def default_device() -> torch.device:
    """Return the first GPU, if there is one, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
) -> LanguageModel:
    """Load the model of a checkpoint of any layout, with parameters and activations of `dtype`.

    Each rank of `group` reads only its own rows. Raises CheckpointError, which names the problem, if the checkpoint is
    invalid, and UserError if the model can't be split evenly over the ranks, or there is no such device.
    """
    _check_device(device)
    reader = CheckpointReader(Path(path)).complete()
    transformer = read_transformer(reader, device=device, dtype=dtype, group=group)
    model = LanguageModel(transformer, reader.record)
    model.directory = reader.directory
    return model.eval()


def _check_device(device: str | torch.device) -> None:
    try:
        has_values = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError) as error:  # of torch without CUDA: an AssertionError
        raise UserError(f"device {device} can't be used here: {str(error).splitlines()[0]}") from error
    if not has_values:
        raise UserError(f"device {device} can't be used here: its tensors have no values")
