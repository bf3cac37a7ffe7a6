"""A checkpoint's model on one device, or tensor-parallel over the ranks of a group, for evaluation and research."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.kernels.dispatch import choose_decoding_kernels
from megatron_tf.layers.cache import KeyValueCache
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.parallel.collectives import all_gather_copy, group_rank, group_size
from megatron_tf.parallel.sharding import split_rows
from megatron_tf.tokenformer.parameters import Parameter, model_parameters


class LanguageModel(nn.Module):
    """A TokenFormer with all its layers: ids [B, S] -> logits [B, S, V], V the padded vocabulary.

    `config` describes the model, `record` is what its checkpoint knows of the run. Of the logits the first
    `config.vocab_size` are of ids that the tokenizer has; the others pad the vocabulary, and no text has them.
    """

    def __init__(self, transformer: TokenFormer, record: RunRecord) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config
        self.record = record
        self.directory: Path | None = None
        """Of the checkpoint it was loaded from."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like call: the computation follows the type of the parameters."""
        super()._apply(fn, recurse)
        self.transformer.dtype = self.transformer.embedding.weight.dtype
        return self

    @property
    def metadata(self) -> dict[str, Any]:
        """The record as metadata.json holds it."""
        return self.record.to_json()

    def forward(self, token_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """`cache` holds the tokens before these and takes these in."""
        logits: Tensor = self.transformer(token_ids, cache)
        return self._gathered(logits).transpose(0, 1)

    def hidden_states(self, token_ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Ids [B, S] -> the last layer's output [B, S, D], which `logits` takes."""
        return self.transformer.hidden_states(token_ids, cache).transpose(0, 1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] -> logits [B, S, V]; costs V x D products a position, so give it those that are needed."""
        return self._gathered(self.transformer.logits(hidden_states.transpose(0, 1))).transpose(0, 1)

    def new_cache(self) -> KeyValueCache:
        """An empty cache for one batch."""
        return KeyValueCache(self.config.num_layers)

    def arrange_for_decoding(self) -> None:
        """Take the kernels that are fastest for a few rows on the model's device; no value changes."""
        self.transformer.use(choose_decoding_kernels(self.device))

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that share the model; None where one process has it all."""
        return self.transformer.group

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.transformer.embedding.weight.device

    def _gathered(self, logits: Tensor) -> Tensor:
        return all_gather_copy(logits, -1, self.group)


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    group: ProcessGroup | None = None,
) -> LanguageModel:
    """Load the model of a checkpoint of any layout, with parameters and activations of `dtype`.

    Each rank of `group` reads only its own rows of tokens. Raises CheckpointError naming what is wrong with the
    checkpoint, and UserError where the ranks can't share the model evenly.
    """
    reader = CheckpointReader(Path(path)).complete()
    config = reader.record.model
    config.check_tensor_parallel(group_size(group))
    with torch.device("meta"):
        transformer = TokenFormer(config, group=group, dtype=dtype)
    declared = model_parameters(config)
    # parameters of the meta device hold no memory: each is replaced by the rows that are read for it
    for path, module in transformer.named_modules():
        for role, _ in list(module.named_parameters(recurse=False)):
            rows = _read_own_rows(reader, declared[f"{path}.{role}"], group)
            module.register_parameter(role, nn.Parameter(rows.to(device, dtype)))
    for path, pattention in transformer.pattentions().items():
        pattention.tau = reader.record.tau[path]
    model = LanguageModel(transformer, reader.record)
    model.directory = reader.directory
    return model.eval()


def _read_own_rows(reader: CheckpointReader, parameter: Parameter, group: ProcessGroup | None) -> Tensor:
    name, rows = parameter.name, parameter.shape[0]
    if reader.shape("model", name) != parameter.shape:
        raise CheckpointError(
            f"{reader.directory}: {name} is {list(reader.shape('model', name))}, its model has {list(parameter.shape)}"
        )
    start, stop = 0, rows
    if parameter.is_sharded:
        start, stop = split_rows(rows, group_size(group), group_rank(group))
    return reader.read_rows("model", name, start=start, stop=stop)
