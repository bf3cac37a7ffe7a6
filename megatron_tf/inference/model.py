"""A checkpoint's model on one device, for evaluation and research."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.layers.attention import KeyValueCache
from megatron_tf.model.tokenformer import TokenFormer


class LanguageModel(nn.Module):
    """A TokenFormer on one device: ids [B, S] -> logits [B, S, V], V the padded vocabulary."""

    def __init__(self, transformer: TokenFormer, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config
        self.metadata = metadata

    def forward(self, token_ids: Tensor, caches: Sequence[KeyValueCache] | None = None) -> Tensor:
        """`caches`, one a layer, hold the tokens before these and take these in."""
        logits: Tensor = self.transformer(token_ids, caches)
        return logits.transpose(0, 1)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for one generation."""
        return [KeyValueCache() for _ in range(self.config.num_layers)]


def load_model(path: str | Path, device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint of any layout, in fp32. Raises CheckpointError naming what is wrong with it."""
    reader = CheckpointReader(Path(path))
    config = parse_config(ModelConfig, reader.metadata["model"], str(reader.directory))
    with torch.device("meta"):
        transformer = TokenFormer(config)
    transformer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.copy_(reader.read_rows("model", name, 0, parameter.shape[0]))
    for name, module in transformer.pattentions().items():
        module.tau = reader.metadata["tau"][name]
    return LanguageModel(transformer, reader.metadata).eval()
