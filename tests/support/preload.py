"""What the processes of the tests have imported when they start."""

import contextlib
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

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: what is forked later keeps the number of threads

for name in NEEDED:
    importlib.import_module(name)
for name in OPTIONAL:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
