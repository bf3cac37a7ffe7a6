"""The model class `megatron_tf` for lm-evaluation-harness, on one process or data-parallel ranks.

Tokenization and truncation of long contexts from the left match lm-eval's own class for Hugging Face models. A
continuation that exceeds the context length by itself, which that class rejects, is scored in windows.
"""

import difflib
import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from megatron_tf.config import ConfigError
from megatron_tf.inference.model import load_model
from megatron_tf.inference.sampling import Sampling, seed_of_sample
from megatron_tf.inference.scoring import Request, Score, rolling_windows, score
from megatron_tf.inference.text import Limits, check_text, continue_ids
from megatron_tf.inference.tokenizer import load_tokenizer
from megatron_tf.parallel.collectives import all_gather_copy
from megatron_tf.parallel.mesh import Mesh, init_mesh
from megatron_tf.tokenformer.dtypes import DTYPES

_GENERATED_TOGETHER = 8  # contexts per batch with batch_size auto

_PRECISIONS = {
    "float32": "fp32",
    "fp32": "fp32",
    "auto": "fp32",  # the dtype of checkpoints
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
}
"""Our names of lm-eval's dtypes."""

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request as TemplateLM tokenizes it: ((context, continuation), context ids, continuation ids)."""


class Text(NamedTuple):
    """Ids of a text, of which ids[first:] are scored."""

    ids: list[int]
    first: int


class MegatronTF(TemplateLM):
    """A model from a checkpoint of any layout; ranks started by torchrun are data-parallel replicas.

    `batch_size` is lm-eval's: a number of sequences, or "auto" to choose it by their length. `max_length` is the
    context length, by default that of training. Waiting for another rank fails after `distributed_timeout_seconds`.
    `dtype` is that of weights and activations, by default fp32. Raises UserError for what a user can fix.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer_model: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        distributed_timeout_seconds: int = 3600,
        dtype: str = "float32",
        **others: Any,
    ) -> None:
        super().__init__()
        # checked before the rendezvous, after which a rank that fails leaves the others waiting
        _check_names(others)
        if checkpoint is None:
            raise ConfigError("model_args has no checkpoint: add checkpoint=DIR")
        self._batch_size = _parse_batch_size(batch_size)
        _check_number("max_length", max_length, least=2)
        _check_number("max_gen_toks", max_gen_toks, least=1)
        _check_number("distributed_timeout_seconds", distributed_timeout_seconds, least=1)
        if dtype not in _PRECISIONS:
            raise ConfigError(f"dtype is {dtype!r}: choose from {', '.join(_PRECISIONS)}")
        self._mesh = init_mesh(tensor=1, pipeline=1, data=None, timeout=timedelta(seconds=distributed_timeout_seconds))
        # lm-eval distributes requests and gathers answers by these two
        self._rank = self._mesh.rank("dp")
        self._world_size = self._mesh.size("dp")
        self._device = _choose_device(device, self._mesh)
        self._model = load_model(str(checkpoint), device=str(self._device), dtype=DTYPES[_PRECISIONS[dtype]])
        self._tokenizer = load_tokenizer(self._model, _as_path(tokenizer_model))
        self.max_length = max_length or self._model.record.seq_length
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-document id, which also precedes texts without a context."""
        return self._tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """Return a name that identifies the tokenizer in lm-eval's caches."""
        return "megatron_tf-{type}-{sha256}".format(**self._tokenizer.identity)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text, without special tokens."""
        check_text(string, "a request of the task")
        ids: list[int] = self._tokenizer.encode_batch([string]).ids.tolist() if string else []
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, each with as much of the end of its context as fits."""
        texts = [_text(request, self.eot_token_id) for request in requests]
        answers = [(0.0, False)] * len(texts)
        for i, found in self._scores(texts, disable_tqdm):
            answers[i] = (found.log_likelihood, found.is_greedy)
            # immediately: lm-eval's cache lets an interrupted evaluation resume
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts after an end of document, with each token predicted once."""
        texts = [Text([self.eot_token_id, *self.tok_encode(request.args[0])], 1) for request in requests]
        answers = [0.0] * len(texts)
        for i, found in self._scores(texts, disable_tqdm):
            answers[i] = found.log_likelihood
            self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, answers[i])
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate from each context until a stop string, the end of the document or the token limit."""
        # a batch shares its options: stop strings, temperature, number of tokens
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        size = self._batch_size or _GENERATED_TOGETHER
        batches = []
        for group in alike.values():
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        # before batching: a text must not depend on the rest of its batch
        seeds = _seeds([repr(request.args) for request in requests])
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.rank > 0) as bar:
            for batch in batches:
                contexts = [requests[i].args[0] for i in batch]
                found = self._continue(contexts, requests[batch[0]].args[1], [seeds[i] for i in batch])
                for i, text in zip(batch, found, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return texts

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the ranks' flattened tensors."""
        return all_gather_copy(tensor.reshape(-1), 0, self._mesh.group("dp"))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Gather the ranks' objects on rank `dst`; returns None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst, self._mesh.group("dp"))
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(self._mesh.group("dp"))

    def _scores(self, texts: Sequence[Text], disable_tqdm: bool) -> Iterator[tuple[int, Score]]:
        """Yield (index, score) of each text with ids to score, as soon as its last window is scored."""
        windows: list[Request] = []
        owners = []  # the text of each window
        for owner, (ids, first) in enumerate(texts):
            of_text = list(rolling_windows(ids, window=self.max_length, stride=self.max_length, first=first))
            windows += of_text
            owners += [owner] * len(of_text)
        missing = Counter(owners)  # scores come longest first, so windows of different texts are interleaved
        totals = [Score(0.0, True)] * len(texts)
        found = score(self._model, windows, self._batch_size)
        interval = 0.1 if sys.stderr.isatty() else 30
        hidden = disable_tqdm or self.rank > 0
        for i, (log_likelihood, is_greedy) in tqdm(
            found, total=len(owners), desc="loglikelihood", mininterval=interval, disable=hidden
        ):
            owner = owners[i]
            so_far = totals[owner]
            totals[owner] = Score(so_far.log_likelihood + log_likelihood, so_far.is_greedy and is_greedy)
            missing[owner] -= 1
            if not missing[owner]:
                yield owner, totals[owner]

    def _continue(self, contexts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]) -> list[str]:
        wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        num_tokens = wanted["max_gen_toks"]
        room = self.max_length - num_tokens
        if room < 1:
            raise ConfigError(f"max_gen_toks {num_tokens} leaves no room for a context in max_length {self.max_length}")
        limits = Limits(num_tokens, [stop for stop in wanted["until"] if stop])
        sampling = Sampling(wanted.get("temperature") or 0.0, wanted.get("top_k") or 0, wanted.get("top_p") or 1.0)
        prompts = [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context in contexts]
        texts = [""] * len(prompts)
        continuations = continue_ids(
            self._model, self._tokenizer, prompts, sampling=sampling, limits=limits, seed=seeds
        )
        for i, piece, _ in continuations:
            texts[i] += piece
        return texts


def _choose_device(requested: str | None, mesh: Mesh) -> torch.device:
    """Choose the device: lm-eval requests cuda:0 by default, on every rank and even without a GPU."""
    if requested is None or not torch.cuda.is_available() or (requested != "cpu" and mesh.size("dp") > 1):
        return mesh.device
    return torch.device(requested)


def _seeds(requests: Sequence[str]) -> list[int]:
    """Return a seed for each request: that of the process, or another one for repetitions of the same request."""
    seen: Counter[str] = Counter()
    seeds = []
    for request in requests:
        seeds.append(seed_of_sample(torch.initial_seed() % 2**63, seen[request]))
        seen[request] += 1
    return seeds


def _text(request: Pair, eod: int) -> Text:
    """Build the text of a request.

    A blank context, which lm-eval moves to the continuation, counts as empty: the text then starts a document.
    """
    texts, context, continuation = request
    if not continuation:
        raise ConfigError(f"the tokenizer leaves no token for the continuation of {texts}")
    context = context or [eod]
    return Text(context + continuation, len(context))


def _check_names(others: dict[str, Any]) -> None:
    if not others:
        return
    given = next(iter(others))
    parameters = inspect.signature(MegatronTF.__init__).parameters
    known = [name for name in parameters if name not in ("self", "others")]
    near = "checkpoint" if given == "pretrained" else next(iter(difflib.get_close_matches(given, known, n=1)), None)
    hint = f"did you mean {near}? " if near else ""
    raise ConfigError(f"model_args has the unknown key {given!r}: {hint}the keys are {', '.join(known)}")


def _check_number(name: str, value: Any, least: int) -> None:
    if value is not None and (type(value) is not int or value < least):
        raise ConfigError(f"{name} is {value!r}: it must be {least} or more")


def _as_path(tokenizer_model: str | None) -> Path | None:
    if tokenizer_model == "":
        raise ConfigError("tokenizer_model is empty: name the tokenizer's file, or leave it out")
    return None if tokenizer_model is None else Path(tokenizer_model)


def _parse_batch_size(batch_size: int | str) -> int | None:
    if batch_size == "auto":
        return None
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f'batch_size is {batch_size!r}: give a number of sequences, or "auto"')
    return size
