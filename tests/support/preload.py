"""What the processes of the tests have imported when they start."""

import contextlib
import importlib

import torch._dynamo
import torch.distributed.pipelining
import torch.distributed.run  # noqa: F401

import tests.support.ranks
import tests.support.victims  # noqa: F401

for optional in ("transformers", "lm_eval"):
    with contextlib.suppress(ImportError):
        importlib.import_module(optional)
