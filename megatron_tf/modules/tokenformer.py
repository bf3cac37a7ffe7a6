"""The whole model as a torch.nn module: built from a configuration, loaded from a checkpoint, or grown."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.convert.external import TokenizerChoice, external_record, unknown_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.layers.cross_entropy import IGNORE_INDEX
from megatron_tf.model.from_checkpoint import fill, read_transformer
from megatron_tf.model.tokenformer import TokenFormer as Transformer
from megatron_tf.tokenformer.parameters import initial_taus


class TokenFormer(LanguageModel):
    """A whole TokenFormer in one process: ids [B, S] -> logits [B, S, V], where V is the padded vocabulary size.

    `config` is a ModelConfig, or a mapping of its keys (those of the section `model` of a configuration). Initial
    values depend on `seed` only, and are those of a run with this seed; so are the rows that `grow` adds later.
    `seq_length` is the number of tokens into which evaluations cut a text. `dtype` is that of parameters and
    activations. On the device "meta" nothing is initialized. Raises ConfigError for an invalid configuration.

    Its `state_dict()` also holds the temperatures and, as JSON, the `record`, with the history of growth; loading it
    takes a model of the same `config`.
    """

    def __init__(
        self,
        config: ModelConfig | Mapping[str, Any],
        *,
        seed: int = 1234,
        seq_length: int = 2048,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(config, ModelConfig):
            config = parse_config(ModelConfig, dict(config), "config")
        config.check_rotary()
        with torch.device("meta"):
            transformer = Transformer(config, dtype=dtype)
        super().__init__(transformer, _new_record(config, seed=seed, seq_length=seq_length))
        if torch.device(device).type != "meta":
            fill(
                transformer,
                lambda parameter: parameter.initial_rows(seed, 0, parameter.shape[0]).to(device, dtype),
                self.record.tau,
            )

    def loss(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of ids [B, S] against `targets` [B, S], which are the ids that follow them.

        Returns a scalar in fp32, or in fp64 for fp64, without ever storing all logits. Negative targets, such as -100,
        are ignored. Backward can run only once. Raises UserError for a target outside the vocabulary.
        """
        highest, count = torch.stack((targets.max(), (targets >= 0).sum())).tolist()  # one wait for the device
        if highest >= self.config.vocab_size:
            raise UserError(f"targets has the id {highest}, but model.vocab_size is {self.config.vocab_size}")
        targets = targets.masked_fill(targets < 0, IGNORE_INDEX)
        result: Tensor = self.transformer(token_ids, targets=targets, divisor=max(count, 1))
        return result

    def current_record(self) -> RunRecord:
        """Return the record with the temperatures as they are in the modules."""
        taus = {path: pattention.tau for path, pattention in self.transformer.pattentions().items()}
        return replace(self.record, tau=taus)

    def get_extra_state(self) -> Tensor:
        """Return the record for `state_dict()`: JSON in UTF-8 as a tensor, since some programs store only tensors."""
        text = json.dumps(self.current_record().to_json())
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the record from a `state_dict()`. Raises UserError if it is that of another model."""
        record = RunRecord.from_json(json.loads(bytes(state.tolist())), "the state_dict")
        if record.model != self.config:
            raise UserError(
                f"the state_dict is of another model, which may have grown: build TokenFormer(config) with its "
                f"configuration, {record.model}"
            )
        self.record = record


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TokenFormer:
    """Load a checkpoint of any layout, with parameters and activations of `dtype`, in evaluation mode.

    Raises CheckpointError, which names the problem, if the checkpoint is invalid.
    """
    reader = CheckpointReader(Path(path)).complete()
    model = TokenFormer(reader.record.model, device="meta", dtype=dtype)
    model.transformer = read_transformer(reader, device=device, dtype=dtype)
    model.record = reader.record
    model.directory = reader.directory
    return model.eval()


def _new_record(config: ModelConfig, *, seed: int, seq_length: int) -> RunRecord:
    kind = "NullTokenizer"  # stands for none
    tokenizer = TokenizerChoice(kind, None, unknown_tokenizer(kind, config.vocab_size))
    return external_record(config, tokenizer, tau=initial_taus(config), seq_length=seq_length, seed=seed)
