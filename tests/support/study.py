"""The growth study, which is a folder of scripts: its modules, and a miniature of it."""

import importlib
import sys

from tests.support.paths import EXAMPLES

STUDY = EXAMPLES / "growth_study"


def module(name):
    """Import one of the scripts, which import each other by name."""
    if str(STUDY) not in sys.path:
        sys.path.insert(0, str(STUDY))  # as Python does for a script
    return importlib.import_module(name)


MINIATURE = """
base:
  model: {num_layers: 2, vocab_size: 512, make_vocab_size_divisible_by: 64}
  training: {seq_length: 32, micro_batch_size: 4, global_batch_size: 4, eval_interval: 10, eval_iters: 1,
             eval_after_growth: [0, 1, 4]}
  optimizer: {}
  logging: {log_interval: 4, communication_interval: 0}
schedule: {warmup_fraction: 0.1, min_lr_fraction: 0.1, wsd_decay_fraction: 0.2}
save_interval: 5
seeds: {main: 1, other: 1}
families:
  tokenformer:
    model: {layer: tokenformer, hidden_size: 16, num_attention_heads: 2, rotary_percent: 0.5, init_method_std: 0.1}
    sizes:
      small: {qkv_tokens: 4, proj_tokens: 4, ffn_tokens: 8}
      large: {qkv_tokens: 8, proj_tokens: 8, ffn_tokens: 16}
rates: {tokenformer: [2.0e-3, 4.0e-3]}
chosen_rates: {tokenformer_small: 4.0e-3, tokenformer_large: 4.0e-3, zero_key: 4.0e-3}
arms:
  - {family: tokenformer, size: small, budgets: [1]}
  - {family: tokenformer, size: large, budgets: [1]}
  - {name: zero_key, family: tokenformer, size: large, topic: operator, budgets: [1],
     grow_from: {size: small, budget_ratio: 1}, stages: [{to: large}]}
"""
"""A study of three runs of about 20 steps: a small one, one grown from it, and one from scratch."""
