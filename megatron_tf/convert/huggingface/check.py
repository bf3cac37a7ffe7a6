"""Checks that an export loaded by transformers computes the same as the checkpoint."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.data.bpe_engine import PROBES
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.inference.model import load_model

_TOLERANCE = 2e-5
"""Largest absolute difference of logits that counts as equal."""
_FORWARD = "a forward pass"
_IDS = (2, 64)
_PROMPT_LENGTHS = (7, 3, 5)
_NUM_NEW_TOKENS = 4
_WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy generation": (1, {}),
    "greedy generation without a cache": (1, {"use_cache": False}),
    "greedy generation of a left-padded batch": (3, {}),
    "beam search of a left-padded batch": (3, {"num_beams": 2}),
}
"""Ways to generate: name -> (number of prompts, arguments of `generate`)."""


class _Logits(NamedTuple):
    """Logits computed by transformers in one way."""

    way: str
    ids: Tensor  # [B, S]
    logits: Tensor  # [B, S', V]: logits of the last tokens, except the final `num_unread`
    num_unread: int = 0


def has_transformers() -> bool:
    """Return whether the check can run; transformers needs protobuf to read SentencePiece models."""
    return all(importlib.util.find_spec(package) for package in ("transformers", "google", "google.protobuf"))


def check_logits(
    checkpoint: Path, export: Path, say: Callable[[str], object], *, relative_tolerance: float = 0.0
) -> None:
    """Raise CheckpointError if transformers computes different logits from the `export`; `say` gets the differences.

    If they differ in float32, the comparison is repeated in float64, where rounding can't explain it. A
    `relative_tolerance`, as a share of the largest logit, is for architectures that round to fp32 in any dtype.
    """
    for dtype in (torch.float32, torch.float64):
        differences, largest = _logits_differences(checkpoint, export, dtype)
        worst = float(torch.tensor(list(differences.values())).max())  # NaN where one of them is
        what = f"max |delta logit| between megatron_tf and transformers in {str(dtype).removeprefix('torch.')}"
        say(f"{what}: {worst:.3g} (largest |logit| {largest:.3g})")
        limit = max(_TOLERANCE, relative_tolerance * largest)
        if worst <= limit:
            return
    way, difference = next((way, found) for way, found in differences.items() if not found <= limit)
    raise CheckpointError(f"the exported model's logits differ by {difference:.3g} in {way}, more than {limit:.3g}")


@torch.no_grad()
def _logits_differences(checkpoint: Path, export: Path, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """Return (largest difference of logits for each way to compute them, largest logit).

    Our model reads the ids that transformers generated, so that near ties between two ids don't matter. The models are
    loaded one after the other. Raises CheckpointError if transformers fails.
    """
    theirs = _logits_of_transformers(export, dtype)
    model = load_model(checkpoint).to(dtype)
    model.transformer.dtype = dtype
    differences = dict.fromkeys((_FORWARD, *_WAYS), 0.0)
    largest = torch.zeros((), dtype=dtype)
    for way, ids, logits, num_unread in theirs:
        ours = model(ids)
        ours = ours[:, ours.shape[1] - num_unread - logits.shape[1] : ours.shape[1] - num_unread]
        if ours.shape != logits.shape:
            raise CheckpointError(f"{export}: logits are {list(logits.shape)}, expected {list(ours.shape)}")
        difference = (ours.to(logits.dtype) - logits).abs().max()  # `generate` gives fp32 in any case
        differences[way] = float(difference.maximum(torch.tensor(differences[way])))
        largest = largest.maximum(ours.abs().max())
    return differences, float(largest)


def _logits_of_transformers(export: Path, dtype: torch.dtype) -> list[_Logits]:
    generator = torch.Generator().manual_seed(0)
    with _blame_for("loading"):
        model = load_export(export, dtype)
    num_ids = model.config.megatron_tf["config"]["model"]["vocab_size"]
    ids = torch.randint(num_ids, _IDS, generator=generator)
    prompts = [torch.randint(num_ids, (length,), generator=generator) for length in _PROMPT_LENGTHS]
    with _blame_for(_FORWARD):
        found = [_Logits(_FORWARD, ids, model(ids, use_cache=False).logits)]
    for way, (num_prompts, settings) in _WAYS.items():
        with _blame_for(way):
            found.extend(_generate(model, prompts[:num_prompts], way=way, settings=settings))
    return found


def _generate(model: Any, prompts: Sequence[Tensor], *, way: str, settings: dict[str, Any]) -> Iterator[_Logits]:
    """Generate with transformers, and collect the logits before each new token, prompt by prompt."""
    longest = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts])
    output = model.generate(
        padded,
        attention_mask=mask.long(),
        max_new_tokens=_NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    for sample, prompt in enumerate(prompts):
        rows = output.beam_indices[sample].tolist() if "num_beams" in settings else [sample] * _NUM_NEW_TOKENS
        logits = torch.stack([step[row] for step, row in zip(output.logits, rows, strict=True)])
        ids = output.sequences[sample, longest - len(prompt) :]
        yield _Logits(way, ids[None], logits[None], num_unread=1)  # the last token has not been processed


@contextmanager
def _blame_for(what: str) -> Iterator[None]:
    """Convert any error of transformers to a CheckpointError of one line."""
    try:
        yield
    except Exception as error:
        from transformers import __version__

        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{what} with transformers {__version__} fails: {reason}") from error


def load_export(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load the exported model as users do, in evaluation mode; `options` are those of `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype, **options).eval()


def tokenizer_difference(directory: Path, tokenizer: Tokenizer, texts: Sequence[str] = PROBES) -> str | None:
    """Return the first text, by default of PROBES, that transformers encodes differently; None if there is none."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    expected = [row.tolist() for row in tokenizer.encode_batch(texts).rows()]
    found: Sequence[list[int]] = [theirs(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    pairs = zip(texts, expected, found, strict=True)
    return next((text for text, wanted, have in pairs if wanted != have), None)


def convert_tokenizer(directory: Path) -> None:
    """Write tokenizer.json from a SentencePiece model now, as versions of transformers convert it differently."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
