"""Imports that the tests' processes share before they are forked."""

import contextlib
import gc
import importlib
import os

NEEDED = (
    "torch._dynamo",
    "torch.distributed.pipelining",
    "torch.distributed.run",
    "megatron_tf.commands.resharding",
    "megatron_tf.inference.generation",
    "megatron_tf.training.run.trainer",
    "tests.support.ranks",
    "tests.support.victims",
)
OPTIONAL = ("transformers", "lm_eval")

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: forked processes keep this number of threads

for name in NEEDED:
    importlib.import_module(name)
for name in OPTIONAL:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

gc.freeze()  # no forked process needs to look at what was imported, and so copy it
