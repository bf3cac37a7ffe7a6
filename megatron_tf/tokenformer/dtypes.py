"""Types that weights and activations may have, by the names of the configuration and of --dtype."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
