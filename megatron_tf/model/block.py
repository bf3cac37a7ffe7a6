"""A layer of a TokenFormer, or of the transformer to compare it with."""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_tf.config import ModelConfig
from megatron_tf.kernels.adapters import Attend
from megatron_tf.kernels.documents import Documents
from megatron_tf.layers.attention import Attention, LinearAttention, PattentionAttention
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.linear import MLP
from megatron_tf.layers.norm import BlockNorm, RMSNorm
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.sequence import enter_tensor_parallel, leave_tensor_parallel
from megatron_tf.layers.token_chunks import Dim, TensorRanks


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += ffn(norm(x)), where ffn is a single Pattention or an MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, group: ProcessGroup | None, sequence_parallel: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        sequence_group = group if sequence_parallel else None
        self.attention_norm = _block_norm(config, sequence_group)
        norm = config.norm_activation
        ffn_tokens = config.token_counts("ffn")[layer]
        if config.layer == "tokenformer":
            qkv_tokens, proj_tokens = (config.token_counts(kind)[layer] for kind in ("qkv", "proj"))
            self.attention: Attention = PattentionAttention(
                width,
                heads,
                qkv_tokens=qkv_tokens,
                proj_tokens=proj_tokens,
                norm_activation=norm,
                group=group,
                sequence_parallel=sequence_parallel,
            )
            ffn: Pattention | MLP = Pattention(width, width, num_tokens=ffn_tokens, norm_activation=norm)
        else:
            self.attention = LinearAttention(
                width,
                heads,
                qk_norm_epsilon=config.layernorm_epsilon if config.qk_norm else None,
                group=group,
                sequence_parallel=sequence_parallel,
            )
            ffn = MLP(width, ffn_tokens, is_gated=config.mlp == "swiglu")
        # modules are in the order in which they run, which is that of the declared parameters
        self.ffn_norm = _block_norm(config, sequence_group)
        self.ffn = ffn
        tokens_or_whole: Dim | None = -2 if sequence_parallel else None
        self.ffn_ranks = TensorRanks(group, gather_dim=tokens_or_whole, scatter_dim=tokens_or_whole)
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        attend: Attend | None = None,
        documents: Documents | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Apply the layer to x [s, B, D] -> [s, B, D]; the other arguments are those of `Attention.forward`."""
        out = self.attention(self.attention_norm(x), rotary, attend=attend, documents=documents, dropout=dropout)
        x = x + out if dropout is None else dropout.hidden(out, "attention", residual=x)
        normalized = self.ffn_norm(x)
        # gathered after the norm, so that each rank normalizes only its own part of the sequence
        if isinstance(self.ffn, Pattention):
            out = self.ffn(normalized, self.ffn_ranks)
        else:
            out = self.ffn(enter_tensor_parallel(normalized, self.group, self.sequence_parallel))
            out = leave_tensor_parallel(out, self.group, self.sequence_parallel)
        return x + out if dropout is None else dropout.hidden(out, "ffn", residual=x)


def _block_norm(config: ModelConfig, sequence_group: ProcessGroup | None) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.layernorm_epsilon, sequence_group)
    return BlockNorm(config.layernorm_epsilon)
