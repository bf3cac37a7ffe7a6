"""The `model` section of a configuration."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.types import STRICT, Number, NumLayers, Size

NormActivation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
TokenCounts = Size | Annotated[list[Size], Field(min_length=1)]
TOKEN_KINDS = ("qkv", "proj", "ffn")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ModelConfig:
    """Architecture of the TokenFormer (arXiv 2410.23168), or of a plain transformer baseline with the same trunk."""

    num_layers: NumLayers
    """Number of transformer blocks."""
    hidden_size: Size
    """Width D of the residual stream."""
    num_attention_heads: Size
    """Number of attention heads; must divide hidden_size and be divisible by the tensor-parallel size."""
    layer: Literal["tokenformer", "transformer"] = "tokenformer"
    """tokenformer: every projection is a Pattention. transformer, the baseline: linear projections and an MLP."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Norms of the residual stream. layernorm: without parameters inside the blocks, with weight and bias before the
    output layer. rmsnorm, with layer: transformer: each with a weight and no bias, as in Llama."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of layer: transformer. gelu: down(gelu(up x)). swiglu: down(silu(gate x) * up x), as in Llama."""
    qk_norm: bool = False
    """With layer: transformer, apply an RMSNorm to each head's queries and keys before they are rotated, as in Qwen3.
    Its two weights [head_dim] are shared by all heads of a layer."""
    qkv_tokens: TokenCounts | None = None
    """Parameter tokens N of each query, key and value Pattention; a list sets the number for each layer."""
    proj_tokens: TokenCounts | None = None
    """Parameter tokens of the attention output Pattention."""
    ffn_tokens: TokenCounts
    """Parameter tokens of the feed-forward Pattention; hidden units of the MLP with layer: transformer."""
    vocab_size: Size
    """Size of the tokenizer's vocabulary, before padding."""
    make_vocab_size_divisible_by: Size = 128
    """Pad the embedding to a multiple of this; padded rows are trained, not masked."""
    norm_activation: NormActivation = "l2_norm_gelu"
    """How a Pattention turns its scores into the weights of its values."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of sharing the embedding's."""
    rotary_percent: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Fraction of each head's dimensions that are rotated."""
    rotary_base: Annotated[Number, Field(gt=0)] = 10000.0
    """Base period of the rotary position embeddings."""
    layernorm_epsilon: Annotated[Number, Field(gt=0)] = 1e-5
    """Epsilon added to the variance in every layer norm, and to the mean square in every RMSNorm."""
    init_method_std: Annotated[Number, Field(gt=0)] = 0.02
    """Standard deviation of the embedding and of every key token at initialization."""
    output_init_method_std: Annotated[Number, Field(gt=0)] | None = None
    """Standard deviation at initialization of the value tokens of proj and ffn, which write to the residual stream
    (with layer: transformer, of the weights that do); null takes 2 / (num_layers sqrt(hidden_size)), as published."""

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
        if self.layer == "tokenformer":
            self._check_tokenformer()
        for kind in self.token_kinds:
            counts = getattr(self, f"{kind}_tokens")
            if isinstance(counts, list) and len(counts) != self.num_layers:
                raise ConfigError(f"{kind}_tokens has {len(counts)} numbers for {self.num_layers} layers")

    @property
    def token_kinds(self) -> tuple[str, ...]:
        """Kinds of parameter tokens in each layer: those of TOKEN_KINDS that `layer` uses."""
        return TOKEN_KINDS if self.layer == "tokenformer" else ("ffn",)

    def token_counts(self, kind: str) -> list[int]:
        """Return the number of parameter tokens of `kind` in each layer, [num_layers]."""
        counts = getattr(self, f"{kind}_tokens")
        return list(counts) if isinstance(counts, list) else [counts] * self.num_layers

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ConfigError unless `size` ranks can split every layer and the vocabulary evenly."""
        # every layer, because a list may set a different number for each
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
        """Raise ConfigError unless the number of rotated dimensions is even and positive.

        Separate from the other checks so that checkpoints written before it existed still load.
        """
        rotated = int(self.head_dim * self.rotary_percent)
        if rotated == 0 or rotated % 2:
            raise ConfigError(
                f"model.rotary_percent ({self.rotary_percent}) of heads of hidden_size ({self.hidden_size}) / "
                f"num_attention_heads ({self.num_attention_heads}) = {self.head_dim} dimensions is {rotated}: "
                f"it must be an even number above 0"
            )

    def _check_tokenformer(self) -> None:
        for key, default in {"norm": "layernorm", "mlp": "gelu", "qk_norm": False}.items():
            if (value := getattr(self, key)) != default:
                raise ConfigError(f"{key}={value} needs layer: transformer; a TokenFormer has no such choice")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of make_vocab_size_divisible_by."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple
