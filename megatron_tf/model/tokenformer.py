"""TokenFormer: a decoder whose every projection is a Pattention (arXiv 2410.23168).

A `TokenFormer` holds a contiguous range of the layers. With all of them, and no group, it is the whole model on one
device; a pipeline stage is the same class with fewer layers. With context parallelism, S in the shapes below is the
number of tokens that this rank has of each sequence.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_tf.config import ModelConfig
from megatron_tf.kernels.adapters import Attend
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.documents import Documents
from megatron_tf.layers.attention import Attention
from megatron_tf.layers.cache import CachePositions, KeyValueCache
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.embedding import VocabularyWeight
from megatron_tf.layers.norm import BlockNorm, FinalNorm, RMSNorm
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.layers.sequence import enter_tensor_parallel
from megatron_tf.model.block import Block
from megatron_tf.model.decoding import decode
from megatron_tf.parallel.collectives import group_size
from megatron_tf.parallel.context import Context
from megatron_tf.tokenformer.dtypes import wide_dtype


class TokenFormer(nn.Module):
    """The given layers of the model, plus the embedding if they include the first, plus norm and head if the last.

    A parameter has the same name in every stage, so a name identifies one logical tensor. With all layers, the
    parameters are those that `megatron_tf/tokenformer/parameters.py` declares, in the same order.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        *,
        group: ProcessGroup | None = None,
        context: Context | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.config = config
        self.dtype = dtype
        self.group = group
        self.context = context or Context()
        self.sequence_parallel = sequence_parallel
        self.recompute_blocks = False
        self.dropout: Dropout | None = None
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_layers
        self.is_tied = not config.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and self.is_tied):
            self.embedding = self._vocabulary_weight()
        self.layers = nn.ModuleDict(
            {str(i): Block(config, i, group=group, sequence_parallel=sequence_parallel) for i in layers}
        )
        if self.is_last:
            sequence_group = group if sequence_parallel else None
            norm = RMSNorm if config.norm == "rmsnorm" else FinalNorm
            self.final_norm = norm(config.hidden_size, config.layernorm_epsilon, sequence_group)
            if not self.is_tied:
                self.head = self._vocabulary_weight()

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        targets: Tensor | None = None,
        divisor: float = 1.0,
        document_starts: Tensor | None = None,
        document_lengths: Tensor | None = None,
        sample_numbers: Tensor | None = None,
    ) -> Tensor:
        """Run the stage: ids [B, S] (first stage) or hidden states [s, B, D] -> hidden states [s, B, D].

        The last stage returns this rank's logits [S, B, V / R], or with `targets` what `loss` returns for them and
        `divisor`. The other arguments are those of `hidden_states`.
        """
        x = self.hidden_states(
            x,
            cache,
            document_starts=document_starts,
            document_lengths=document_lengths,
            sample_numbers=sample_numbers,
        )
        if not self.is_last:
            return x
        return self.logits(x) if targets is None else self.loss(x, targets, divisor)

    def hidden_states(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        document_starts: Tensor | None = None,
        document_lengths: Tensor | None = None,
        sample_numbers: Tensor | None = None,
    ) -> Tensor:
        """Run the layers: ids [B, S] (first stage) or hidden states [s, B, D] -> hidden states [s, B, D].

        `cache` holds the previous tokens, and the new ones are appended to it. `document_starts` [B, S] is the position
        in the sequence where each token's document begins; it turns on intra-document masking, and positions restart in
        each document. It comes with `document_lengths`, int32 [B, M]: the lengths of each whole sample's documents,
        padded with zeros, on the host if the kernels' `attend_documents` reads them there. `sample_numbers` [B] number
        the samples in the run's data; without them there is no dropout. The host reads none of the other tensors, which
        are on the device.
        """
        dropout = None
        if self.dropout is not None and sample_numbers is not None:
            dropout = self._dropout_of(self.dropout, x, sample_numbers)
        positions: CachePositions | None = None
        if cache is not None:
            positions = cache.extend(x.shape[0], x.shape[1], device=x.device, dtype=self.dtype)
        if self.is_first:
            x = self.embedding.embed(x).to(self.dtype)
            if dropout is not None:
                x = dropout.hidden(x, "embedding")
        rotary = self._rotary(x, positions, document_starts)
        documents = None
        if document_starts is not None:
            assert document_lengths is not None
            documents = Documents(document_starts, document_lengths)
        for i, (layer, block) in enumerate(self.layers.items()):
            attend: Attend | None = None
            if cache is not None and positions is not None:
                decoded = decode(block, x, rotary, cache=cache.layers[i], positions=positions)
                if decoded is not None:
                    x = decoded
                    continue
                attend = partial(cache.layers[i].attend, positions=positions)
            dropped = None if dropout is None else replace(dropout, layer=int(layer))
            run: Callable[..., Tensor] = block
            if self.recompute_blocks and torch.is_grad_enabled():
                # nothing is drawn from torch's generators
                run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x = run(x, rotary, attend=attend, documents=documents, dropout=dropped)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Compute this rank's logits [S, B, V / R] of hidden states [s, B, D] after the last layer."""
        return self.output_weight.logits(self._final_states(x))

    def loss(self, x: Tensor, targets: Tensor, divisor: float) -> Tensor:
        """Compute the summed loss of predicting `targets` [B, S] over `divisor`, a scalar, without storing all logits.

        x [s, B, D] are hidden states after the last layer. The loss is the same on every tensor-parallel rank. Targets
        that are IGNORE_INDEX add nothing.
        """
        return self.output_weight.loss(self._final_states(x), targets, divisor)

    @property
    def output_weight(self) -> VocabularyWeight:
        """The weight that computes logits, on the last stage: the head, or the embedding if they are tied."""
        return self.embedding if self.is_tied else self.head

    def use(self, kernels: Kernels) -> None:
        """Switch all layers to these kernels, which changes results only by rounding."""
        if self.dropout is not None:
            self.dropout = replace(self.dropout, drop=kernels.drop)
        for module in self.modules():
            if isinstance(module, Pattention):
                module.use(kernels.pattention)
                module.products = kernels.products
            elif isinstance(module, Attention):
                module.attend = kernels.attend
                module.attend_documents = kernels.attend_documents
                module.rotate = kernels.rotate
            elif isinstance(module, (BlockNorm, FinalNorm)):
                module.normalize = kernels.normalize
            elif isinstance(module, VocabularyWeight):
                module.linear = kernels.linear
                module.loss_kernels = kernels.loss

    def pattentions(self) -> dict[str, Pattention]:
        """Return every Pattention of the stage by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Pattention)}

    def _final_states(self, x: Tensor) -> Tensor:
        """Apply the final norm to hidden states [s, B, D], whole afterwards: [S, B, D]."""
        return enter_tensor_parallel(self.final_norm(x), self.group, self.sequence_parallel)

    def _vocabulary_weight(self) -> VocabularyWeight:
        config = self.config
        return VocabularyWeight(
            config.padded_vocab_size, config.hidden_size, group=self.group, sequence_parallel=self.sequence_parallel
        )

    def _dropout_of(self, dropout: Dropout, x: Tensor, sample_numbers: Tensor) -> Dropout:
        """Build the dropout of a micro-batch, given its ids x [B, S] or hidden states [s, B, D]."""
        tokens = x.shape[1] if self.is_first else self._gathered_length(x)
        return dropout.of_samples(
            sample_numbers,
            positions=self.context.positions(tokens, x.device),
            heads=self.config.num_attention_heads,
            group=self.group,
            sequence_parallel=self.sequence_parallel,
        )

    def _gathered_length(self, x: Tensor) -> int:
        """Return S, given hidden states [s, B, D]."""
        return x.shape[0] * (group_size(self.group) if self.sequence_parallel else 1)

    def _rotary(
        self, x: Tensor, positions: CachePositions | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dim = int(self.config.head_dim * self.config.rotary_percent)
        indices = (
            positions.indices if positions else self.context.positions(self._gathered_length(x), x.device)[:, None]
        )
        if document_starts is not None:
            indices = indices - document_starts.t()
        cos, sin = rotary_tables(indices, dim, self.config.rotary_base, dtype=wide_dtype(x.dtype))
        return cos.to(x.dtype), sin.to(x.dtype)
