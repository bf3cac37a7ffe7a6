"""The model class for lm-evaluation-harness, known there as `megatron_tf`: one process, or ranks that share the work.

Texts become ids, and long contexts lose their left end, as in lm-eval's own class for Hugging Face models. What is
longer than a context even without one, which that class refuses, is scored in windows.
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

_GENERATED_TOGETHER = 8  # contexts, with batch_size auto

_PRECISIONS = {
    "float32": "fp32",
    "fp32": "fp32",
    "auto": "fp32",  # what checkpoints hold
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
}
"""What lm-eval calls a type, and what we call it."""

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""((context, continuation), their ids): what TemplateLM makes of a request."""


class Text(NamedTuple):
    """Ids of a text that is to be scored from one on."""

    ids: list[int]
    first: int


class MegatronTF(TemplateLM):
    """A checkpoint of any layout, whole on each rank; ranks started by torchrun are data-parallel replicas.

    `batch_size` is lm-eval's: a number of sequences, or "auto" for as many as suits their length. `max_length` is the
    length of contexts, by default the one the model was trained with. Every wait for another rank ends with an error
    after `distributed_timeout_seconds`. `dtype` is that of weights and activations, by default fp32. Raises
    UserError for what a user can fix.
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
        # arguments are checked before the ranks meet, where a rank that fails leaves the others waiting
        _check_names(others)
        if checkpoint is None:
            raise ConfigError("model_args name no checkpoint: write checkpoint=DIR")
        self._batch_size = _parse_batch_size(batch_size)
        _check_number("max_length", max_length, least=2)
        _check_number("max_gen_toks", max_gen_toks, least=1)
        _check_number("distributed_timeout_seconds", distributed_timeout_seconds, least=1)
        if dtype not in _PRECISIONS:
            raise ConfigError(f"dtype is {dtype!r}: known are {', '.join(_PRECISIONS)}")
        self._mesh = init_mesh(tensor=1, pipeline=1, data=None, timeout=timedelta(seconds=distributed_timeout_seconds))
        # by these two lm-eval shares out the requests, and gathers the answers
        self._rank = self._mesh.rank("dp")
        self._world_size = self._mesh.size("dp")
        self._device = _choose_device(device, self._mesh)
        self._model = load_model(str(checkpoint), device=str(self._device), dtype=DTYPES[_PRECISIONS[dtype]])
        self._tokenizer = load_tokenizer(self._model, _as_path(tokenizer_model))
        self.max_length = max_length or self._model.record.seq_length
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and stands before a text without a context."""
        return self._tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """Tells one tokenizer from another in lm-eval's caches."""
        return "megatron_tf-{type}-{sha256}".format(**self._tokenizer.identity)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; there are no special ones to add."""
        check_text(string, "a request of the task")
        ids: list[int] = self._tokenizer.encode_batch([string]).ids.tolist() if string else []
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, each given the end of its context that fits."""
        texts = [_text(request, self.eot_token_id) for request in requests]
        answers = [(0.0, False)] * len(texts)
        for i, found in self._scores(texts, disable_tqdm):
            answers[i] = (found.log_likelihood, found.is_greedy)
            # at once, not at the end: lm-eval's cache lets an interrupted evaluation resume
            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts after an end of document, each token predicted once."""
        texts = [Text([self.eot_token_id, *self.tok_encode(request.args[0])], 1) for request in requests]
        answers = [0.0] * len(texts)
        for i, found in self._scores(texts, disable_tqdm):
            answers[i] = found.log_likelihood
            self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, answers[i])
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop string, the end of the document or a number of tokens."""
        # a batch has one set of options: stop strings, temperature, number of tokens
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        size = self._batch_size or _GENERATED_TOGETHER
        batches = []
        for group in alike.values():
            batches += [group[i : i + size] for i in range(0, len(group), size)]
        # before requests are put into batches: a text does not depend on what else is in its batch
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
        """The ranks' tensors end to end."""
        return all_gather_copy(tensor.reshape(-1), 0, self._mesh.group("dp"))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The ranks' objects on rank `dst`."""
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
        """(index, score) of each text with something to score, as soon as the last of its windows is."""
        windows: list[Request] = []
        owners = []  # of each window, the text it is part of
        for owner, (ids, first) in enumerate(texts):
            of_text = list(rolling_windows(ids, window=self.max_length, stride=self.max_length, first=first))
            windows += of_text
            owners += [owner] * len(of_text)
        missing = Counter(owners)  # scores come longest first, so the windows of a text come among those of others
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
    """lm-eval requests cuda:0 by default, on every rank and without a GPU too."""
    if requested is None or not torch.cuda.is_available() or (requested != "cpu" and mesh.size("dp") > 1):
        return mesh.device
    return torch.device(requested)


def _seeds(requests: Sequence[str]) -> list[int]:
    """A seed for each: that of the process, and others where the same request comes again, whose sample is another."""
    seen: Counter[str] = Counter()
    seeds = []
    for request in requests:
        seeds.append(seed_of_sample(torch.initial_seed() % 2**63, seen[request]))
        seen[request] += 1
    return seeds


def _text(request: Pair, eod: int) -> Text:
    """A context of blanks, which lm-eval gives to the continuation, is an empty one: a document begins."""
    texts, context, continuation = request
    if not continuation:
        raise ConfigError(f"the tokenizer leaves no token to the continuation of {texts}")
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
    raise ConfigError(f"model_args name {given!r}, which is not known: {hint}known are {', '.join(known)}")


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
