"""Writes the checkpoints of this directory: run once, from a source tree of version 0.1 (commit 6650d48).

PYTHONPATH=TREE python make.py TREE OUTPUT
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "far", "away", "<|endoftext|>"]
END = {"id": len(WORDS) - 1, "content": WORDS[-1], "special": True}
END |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
MODEL = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "qkv_tokens": 8,
    "proj_tokens": 8,
    "ffn_tokens": 16,
    "vocab_size": len(WORDS),
    "make_vocab_size_divisible_by": 8,
    "rotary_percent": 1.0,
}
ONE, TWO = ["data/first_text_document"], ["0.7 data/first_text_document", "0.3 data/second_text_document"]
GROWTH = [{"at_step": 2, "ffn_tokens": 32, "qkv_tokens": 16}]
CASES = {
    "l2_norm_gelu": {},
    "gelu_l2_norm_tied": {"model": {"norm_activation": "gelu_l2_norm", "untie_embeddings_and_output_weights": False}},
    "softmax_untied": {"model": {"norm_activation": "softmax", "untie_embeddings_and_output_weights": True}},
    "grown": {"growth": GROWTH},
    "blended": {"data": {"data_path": TWO}},
    "blended_in_megatron_order": {"data": {"data_path": TWO, "order": "megatron"}},
}


def main() -> None:
    tree, output = map(Path, sys.argv[1:])
    tokenizer = {
        "version": "1.0",
        "added_tokens": [END],
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "the"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    (output / "data").mkdir(parents=True)
    (output / "tokenizer.json").write_text(json.dumps(tokenizer))
    for number, name in enumerate(("first", "second")):
        lines = [
            json.dumps({"text": " ".join(WORDS[(i * step + number) % 12] for i in range(20 + step))})
            for step in range(1, 30)
        ]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        options = ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", "tokenizer.json", "--append-eod"]
        command = ["tools/preprocess_data.py", "--input", f"{name}.jsonl", "--output-prefix", f"data/{name}", *options]
        subprocess.run([sys.executable, tree / command[0], *command[1:]], cwd=output, check=True)
        (output / f"{name}.jsonl").unlink()
    for name, changes in CASES.items():
        values = {
            "model": MODEL | changes.get("model", {}),
            "training": {
                "seq_length": 16,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "train_iters": 6,
                "eval_interval": 3,
                "eval_iters": 1,
            },
            "optimizer": {"lr": 0.01, "lr_warmup_iters": 2},
            "data": {
                "data_path": ONE,
                "split": "80,20,0",
                "tokenizer_type": "HFTokenizer",
                "tokenizer_model": "tokenizer.json",
            }
            | changes.get("data", {}),
            "checkpoint": {"save": f"{name}/saved", "save_interval": 3},
            "logging": {"log_interval": 1, "metrics_file": f"{name}/metrics.jsonl"},
            "growth": changes.get("growth", []),
        }
        (output / name).mkdir()
        (output / name / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        subprocess.run([sys.executable, "-m", "megatron_tf.pretrain", f"{name}/run.yaml"], cwd=output, check=True)
        lines = map(json.loads, (output / name / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        (output / name / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
        (output / name / "metrics.jsonl").unlink()
        for step in {2, 6} if "growth" in changes else {6}:
            shutil.rmtree(output / name / "saved" / f"step_{step:08}")
        (output / name / "saved" / "latest").write_text("step_00000003")
    shutil.rmtree(output / "data" / "cache", ignore_errors=True)


main()
