"""The model section of a configuration."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Number, Size

NormActivation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
TokenCounts = Size | Annotated[list[Size], Field(min_length=1)]
TOKEN_KINDS = ("qkv", "proj", "ffn")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """The TokenFormer (arXiv 2410.23168), or a plain transformer of the same trunk to compare it with."""

    num_layers: Annotated[Size, Field(le=10_000_000)]
    """Transformer blocks."""
    hidden_size: Size
    """Width D of the residual stream; growth leaves it as it is."""
    num_attention_heads: Size
    """Heads; must divide hidden_size, and be divisible by the tensor-parallel size."""
    layer: Literal["tokenformer", "transformer"] = "tokenformer"
    """transformer: linear projections and an MLP in place of Pattentions; it can't grow."""
    qkv_tokens: TokenCounts | None = None
    """Parameter tokens N of each of the query, key and value Pattentions; a list gives a number for each layer."""
    proj_tokens: TokenCounts | None = None
    """Parameter tokens of the attention's output Pattention."""
    ffn_tokens: TokenCounts
    """Parameter tokens of the feed-forward Pattention; of a transformer, the MLP's hidden units."""
    vocab_size: Size
    """Ids the tokenizer can produce, before padding."""
    make_vocab_size_divisible_by: Size = 128
    """The embedding is padded to a multiple of this; padded rows are trained and not masked."""
    norm_activation: NormActivation = "l2_norm_gelu"
    """How a Pattention turns scores into weights of its values."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own instead of the embedding's."""
    rotary_percent: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Share of each head's dimensions that are rotated."""
    rotary_base: Annotated[Number, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    layernorm_epsilon: Annotated[Number, Field(gt=0)] = 1e-5
    """Epsilon of every layer norm."""
    init_method_std: Annotated[Number, Field(gt=0)] = 0.02
    """Standard deviation of the embedding and of every key token at birth."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) must be divisible by "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        for kind in ("qkv", "proj"):
            is_given = getattr(self, f"{kind}_tokens") is not None
            if is_given != (self.layer == "tokenformer"):
                raise ConfigError(
                    f"{kind}_tokens is {'given, and a transformer has none' if is_given else 'missing'}: "
                    f"layer is {self.layer}"
                )
        for kind in self.token_kinds:
            counts = getattr(self, f"{kind}_tokens")
            if isinstance(counts, list) and len(counts) != self.num_layers:
                raise ConfigError(f"{kind}_tokens has {len(counts)} numbers for {self.num_layers} layers")

    @property
    def token_kinds(self) -> tuple[str, ...]:
        """Kinds of tokens the layers have."""
        return TOKEN_KINDS if self.layer == "tokenformer" else ("ffn",)

    def token_counts(self, kind: str) -> list[int]:
        """Parameter tokens of `kind` in each layer."""
        counts = getattr(self, f"{kind}_tokens")
        return list(counts) if isinstance(counts, list) else [counts] * self.num_layers

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError, with the numbers, unless `size` ranks can share every layer and the vocabulary evenly."""
        # every layer, since lists may give each another count
        shared = {"num_attention_heads": [self.num_attention_heads], "padded_vocab_size": [self.padded_vocab_size]}
        for kind in self.token_kinds:
            shared[f"{kind}_tokens"] = self.token_counts(kind)
        for key, values in shared.items():
            for value in values:
                if value % size:
                    raise ConfigError(
                        f"model.{key} ({value}) must be divisible by parallel.tensor_model_parallel_size ({size})"
                    )

    def check_rotary(self) -> None:
        """Raise ConfigError, with the numbers, unless rotated dimensions come in pairs. Models that were trained before
        this was checked can still be read."""
        rotated = int(self.head_dim * self.rotary_percent)
        if rotated == 0 or rotated % 2:
            raise ConfigError(
                f"model.rotary_percent ({self.rotary_percent}) of heads of hidden_size ({self.hidden_size}) / "
                f"num_attention_heads ({self.num_attention_heads}) = {self.head_dim} dimensions is {rotated}: "
                f"it must be an even number above 0"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple
