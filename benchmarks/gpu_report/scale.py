"""Sizes of the report's models and tensors: the published ones on a GPU, tiny ones for tests of the logic."""

from dataclasses import dataclass

import torch

PUBLISHED_VOCABULARY = 50277


@dataclass(frozen=True)
class Shape:
    """The shape of one of the report's models."""

    name: str
    layers: int
    width: int
    heads: int
    seq_length: int = 2048
    vocabulary: int = PUBLISHED_VOCABULARY

    @property
    def tokens(self) -> dict[str, int]:
        """Return the numbers of parameter tokens, as published: the width, and four times the width for ffn."""
        return {"qkv_tokens": self.width, "proj_tokens": self.width, "ffn_tokens": 4 * self.width}

    @property
    def transformer_units(self) -> int:
        """Return the MLP width with which a transformer has as many parameters."""
        # a Pattention of n tokens has 2 n D parameters, a linear layer D^2, an MLP of h units 2 h D
        return (3 + 1 + 4) * self.width - 2 * self.width

    def model(self, layer: str = "tokenformer") -> dict[str, object]:
        """Return the `model` section of a configuration."""
        trunk = {
            "num_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
        }
        if layer == "transformer":
            return trunk | {"layer": "transformer", "ffn_tokens": self.transformer_units}
        return trunk | self.tokens


@dataclass(frozen=True)
class Scale:
    """Sizes and repetitions of everything that runs."""

    device: torch.device
    is_quick: bool
    small: Shape
    large: Shape
    micro_batch: int
    """Samples of 2,048 tokens per micro-batch."""
    layers: tuple[tuple[int, int, int], ...]
    """(rows, width, tokens) of single Pattentions."""
    square: int
    """Size of the square matrices whose product gives the peak FLOP/s."""
    copied_mib: int
    """Size of the copy that measures memory bandwidth."""
    lengths: tuple[int, ...]
    """Row lengths of the scores for the checks of the kernels."""
    turns: int
    """Repetitions of each measurement."""


SMALL = Shape("150M", layers=12, width=768, heads=12)
LARGE = Shape("1.5B", layers=40, width=1536, heads=16)
TINY = Shape("tiny", layers=2, width=32, heads=4, seq_length=32, vocabulary=257)


def choose_scale(device: torch.device, *, is_quick: bool) -> Scale:
    """Return the published shapes for a GPU, or tiny ones for a CPU, where measurements are meaningless."""
    if device.type == "cuda":
        return Scale(
            device=device,
            is_quick=is_quick,
            small=SMALL,
            large=LARGE,
            micro_batch=8,
            layers=((16384, 768, 3072), (16384, 1536, 6144), (8192, 4096, 16384)),
            square=8192,
            copied_mib=4096,
            lengths=(7, 1000, 8193) if is_quick else (1, 7, 576, 1000, 3072, 8193, 65536),
            turns=10 if is_quick else 30,
        )
    return Scale(
        device=device,
        is_quick=is_quick,
        small=TINY,
        large=TINY,
        micro_batch=2,
        layers=((64, 32, 128),),
        square=128,
        copied_mib=4,
        lengths=(1, 7, 1000),
        turns=2,
    )
