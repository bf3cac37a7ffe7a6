"""Pattention: attention over learnable key-value parameter tokens, sharded over tensor-parallel ranks.

Shapes: T tokens, D width in, E width out, N parameter tokens, n = N / R of them on each of R ranks, G projections of
the same input that run together (3 for query, key and value). TokenFormer (arXiv 2410.23168), eq. 4 to 7.

| tensor     | one rank  | R ranks    |
|------------|-----------|------------|
| x          | [T, D]    | [T, D], the same on every rank; or a part, [T / R, D] or [T, D / R], which is gathered |
| key_tokens | [N, D]    | [n, D]     |
| value_tokens | [N, E]  | [n, E]     |
| scores     | [G, T, N] | [G, T, n]  |
| statistic  | [G, T]    | [G, T], summed over ranks |
| y          | [G, T, E] | [G, T, E], the same on every rank; or a part, [G, T / R, E] or [G, T, E / R] |
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tf.errors import UserError
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.layers.casting import CastingModule
from megatron_tf.layers.pattention_autograd import BackwardSplit, differentiable_pattention
from megatron_tf.layers.row_probe import RowProbe
from megatron_tf.layers.token_chunks import TensorRanks
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from megatron_tf.tokenformer.parameters import Role

_KEY_STD = 0.02  # model.init_method_std by default
_ONE_RANK = TensorRanks()


class Pattention(CastingModule):
    """A projection D -> E by attention over N parameter tokens.

    It holds keys K [N, D], values V [N, E] and a temperature tau, and computes y = P V. P [T, N] is the row-wise
    normalization of the scores A = X K^T:

        l2_norm_gelu    P = gelu(tau A / |A|)
        gelu_l2_norm    P = tau gelu(A) / |gelu(A)|
        softmax         P = tau softmax(A)

    tau is state and does not follow from the shape: it is initialized to sqrt(N) (softmax: N), stays when tokens with
    zero keys are appended (which makes growth exact), and is saved in checkpoints and in `state_dict()`. It computes in
    the dtype of x. `products` multiply matrices, `kernels` compute P, and `recompute_scores` makes backward recompute A
    instead of saving it; none of them changes the result beyond rounding. A `probe` reads P and V in forward, except in
    fused inference. With a `backward_split`, the gradient of x may be computed before those of the tokens, in two
    passes of autograd, as zero-bubble schedules do; each pass may run once. Between ranks, activations travel in
    `message_chunks`, each while the products of others run.

    On its own it takes the place of a linear layer, with initial values from `reset_parameters`. Raises UserError if
    there is no normalization `norm_activation`, and if a size is below 1.
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_tokens: int, norm_activation: str = "l2_norm_gelu"
    ) -> None:
        super().__init__()
        if norm_activation not in NORMALIZATIONS:
            raise UserError(f"norm_activation is {norm_activation!r}: known are {', '.join(NORMALIZATIONS)}")
        if min(in_features, out_features, num_tokens) < 1:
            raise UserError(f"a Pattention of {in_features} x {num_tokens} x {out_features}: each must be 1 or more")
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, in_features))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, out_features))
        self.norm = NORMALIZATIONS[norm_activation]
        self.kernels = Kernels().pattention
        self.products = Kernels().products
        self.recompute_scores = False
        self.message_chunks = 1
        self.backward_split: BackwardSplit | None = None
        self.probe: RowProbe | None = None
        # free on the meta device, where runs and `load` build models, whose initial values depend on the whole model
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw keys from N(0, 0.02^2) and values from N(0, 1 / N) by torch's generator, and set tau as initially.

        For inputs of unit variance, outputs have a variance of about 1 (0.4 for l2_norm_gelu).
        """
        num_tokens = self.key_tokens.shape[0]
        nn.init.normal_(self.key_tokens, std=_KEY_STD)
        nn.init.normal_(self.value_tokens, std=num_tokens**-0.5)
        self.tau = self.norm.initial_tau(num_tokens)

    def get_extra_state(self) -> Tensor:
        """Return tau for `state_dict()`, as a tensor, so that a state_dict holds nothing but tensors."""
        return torch.tensor(self.tau, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take tau from a `state_dict()`."""
        self.tau = float(state)

    @torch.no_grad()
    def use(self, kernels: PattentionKernels) -> None:
        """Switch to these kernels, and store the value tokens in the memory order that is fastest for them."""
        self.kernels = kernels
        if kernels.stores_columns:
            self.value_tokens.data = self.value_tokens.t().contiguous().t()

    def forward(self, x: Tensor, ranks: TensorRanks = _ONE_RANK) -> Tensor:
        """Compute y [..., E] of x [..., D], of which this rank has the part that `ranks` says."""
        return pattend(x, [self], ranks)[0]

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Compute the scores A [T, N] of all T rows of x [..., D]; single rank, no gradients."""
        return x.reshape(-1, x.shape[-1]) @ self.cast(Role.KEYS, x.dtype).t()

    @torch.no_grad()
    def weights(self, x: Tensor) -> Tensor:
        """Compute the weight of each parameter token, P [..., N], for x [..., D]; single rank, no gradients."""
        scores = self.scores(x)
        tau = scores.new_full(scores.shape[:1], self.tau)
        _, weights = self.kernels.forward(self.norm, scores, tau=tau, reduce=None)
        return weights.unflatten(0, x.shape[:-1])


def pattend(x: Tensor, projections: Sequence[Pattention], ranks: TensorRanks = _ONE_RANK) -> Tensor:
    """Run G projections of the same x [..., D] together -> [G, ..., E], summed over the tensor-parallel ranks.

    Of x and of the result, this rank has the part that `ranks` says: all, or a part along the first dimension (of the
    tokens) or the last. Backward takes a gradient of the same shape, and sums that of x over the ranks.

    The statistics take one all-reduce of G scalars per token in forward and one in backward, independent of N.
    """
    tokens = x.reshape(-1, x.shape[-1])
    keys = [p.detached(Role.KEYS, x.dtype) for p in projections]
    values = [p.detached(Role.VALUES, x.dtype) for p in projections]
    first, y = projections[0], None
    if ranks.group is None:  # several ranks have to reduce a row's statistic between the two products
        y = first.kernels.infer(first.norm, tokens, keys=keys, values=values, taus=[p.tau for p in projections])
    if y is None:
        y = differentiable_pattention(tokens, projections, keys=keys, values=values, ranks=ranks)
    return y.view(len(projections), *ranks.output_shape(x.shape[:-1]), y.shape[-1])
