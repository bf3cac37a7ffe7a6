"""Continue a text: `python -m megatron_tf.generate CHECKPOINT --prompt TEXT`."""

import argparse
import sys
from pathlib import Path

from megatron_tf.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """0 when the text is written, 1 after an error."""
    parser = argparse.ArgumentParser(prog="megatron_tf.generate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or a run's directory of them; of any layout")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=0, help="choose among this many likeliest tokens; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest that reach this sum")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-model", type=Path, help="the tokenizer's file, if it has moved since training")
    args = parser.parse_args(arguments)
    try:
        write_text(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_text(args: argparse.Namespace) -> None:
    """Generate and print as the tokens come. Raises ValueError for what a user can mend."""
    import torch  # --help need not wait for it

    from megatron_tf.data.tokenizer import build_tokenizer
    from megatron_tf.inference.generation import Sampling, generate
    from megatron_tf.inference.model import load_model

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    model = load_model(args.checkpoint)
    data = model.metadata["config"]["data"]
    trained_with = Path(data["tokenizer_model"]) if data["tokenizer_model"] else None
    tokenizer = build_tokenizer(data["tokenizer_type"], args.tokenizer_model or trained_with)
    if tokenizer.identity != model.metadata["tokenizer"]:
        raise ConfigError("the tokenizer is not the one the model was trained with: give that with --tokenizer-model")
    ids = tokenizer.encode_batch([args.prompt]).ids.tolist() or [tokenizer.eod]
    generator = torch.Generator().manual_seed(args.seed)
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for token in generate(model, torch.tensor(ids), args.max_new_tokens, sampling, tokenizer.eod, generator):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes have not all come yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


if __name__ == "__main__":
    sys.exit(main())
