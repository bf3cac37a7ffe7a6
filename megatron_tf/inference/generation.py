"""Generation for a batch of prompts with a key-value cache."""

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.sampling import Sampling, sample_tokens

_PREFILL_TOKENS = 4096  # prompt tokens per call: bounds the memory of long prompts


class Generation:
    """Generates the continuations of prompts of any lengths together.

    Up to rounding, a sample does not depend on the others: each has its own random numbers, which start from its seed.
    Ids that pad the vocabulary are never sampled. With a tensor-parallel model, every rank makes the same calls and
    gets the tokens that the first rank samples.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int | Sequence[int] = 0,
    ) -> None:
        """Prepare the prompts, ids with at least one in each; `seed` is one for all, or one for each.

        Raises UserError for an empty prompt.
        """
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty: it needs a first token, such as the end of a document")
        self.active = list(range(len(prompts)))
        self._model = model
        self._prompts = prompts
        self._sampling = sampling
        self._cache = model.new_cache()
        seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
        self._generators = [torch.Generator().manual_seed(of_prompt) for of_prompt in seeds]
        self._last: Tensor | None = None

    @torch.no_grad()
    def step(self) -> dict[int, int]:
        """Generate the next token of every active sample. Raises UserError if the model's logits are non-finite."""
        hidden = self._read_prompts() if self._last is None else self._model.hidden_states(self._last, self._cache)
        logits = self._model.logits(hidden)[:, 0, : self._model.config.vocab_size]
        tokens = sample_tokens(logits, self._sampling, self._draw(logits.device))
        extremes = torch.stack(logits.aminmax())  # NaN if any logit is
        # read together: each read makes the host wait for the device
        result = torch.cat([tokens, extremes.isfinite().all()[None]])
        if self._model.group is not None:
            dist.broadcast(result, group=self._model.group, group_src=0)
        *ids, is_finite = result.tolist()
        if not is_finite:
            raise UserError("the model's logits are non-finite: its checkpoint comes from a run that had diverged")
        self._last = result[:-1, None]
        return dict(zip(self.active, ids, strict=True))

    def finish(self, samples: Collection[int]) -> None:
        """Remove finished samples from the batch."""
        rows = [row for row, sample in enumerate(self.active) if sample not in samples]
        if len(rows) == len(self.active):
            return
        self.active = [self.active[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        self._cache.select(rows)
        if self._last is not None:
            self._last = self._last[rows]

    def _draw(self, device: torch.device) -> Tensor | None:
        """Draw a random number in [0, 1) for each active sample, float64 [B]; None if the sampling needs none."""
        if self._sampling.is_greedy:
            return None
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])
        if device.type == "cuda":
            uniform = uniform.pin_memory()  # the host would wait for a copy from pageable memory
        return uniform.to(device, non_blocking=True)

    def _read_prompts(self) -> Tensor:
        """Fill the cache, and return the hidden states [B, 1, D] of the prompts' last tokens.

        Prompts are padded on the right, where causal attention ignores it; then the cache drops the padding.
        """
        lengths = [len(prompt) for prompt in self._prompts]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids, self._prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        chunks = ids.to(self._model.device).split(max(1, _PREFILL_TOKENS // len(lengths)), 1)
        hidden = torch.cat([self._model.hidden_states(chunk, self._cache) for chunk in chunks], 1)
        self._cache.keep(lengths)
        return hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1][:, None]
