"""The configured data sets as batches for this replica."""

import json
from pathlib import Path
from typing import Literal

from megatron_tf.config import ConfigError, RunConfig
from megatron_tf.data.blend import BlendedDataset
from megatron_tf.data.gpt_dataset import GPTDataset, split_documents
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.parallel.mesh import Mesh

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
