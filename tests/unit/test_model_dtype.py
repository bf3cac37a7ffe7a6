"""The computation of a loaded model follows the type of its parameters."""

import pytest
import torch

import megatron_tf
from tests.support.models import random_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", random_model())


WAYS = {
    torch.float64: lambda model: model.double(),
    torch.bfloat16: lambda model: model.to(torch.bfloat16),
    torch.float16: lambda model: model.half(),
    torch.float32: lambda model: model.double().float(),
}


@pytest.mark.parametrize("dtype", WAYS)
def test_a_method_that_changes_the_type_gives_what_loading_with_it_gives(checkpoint, dtype):
    ids = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
    changed, loaded = WAYS[dtype](megatron_tf.load(checkpoint)), megatron_tf.load(checkpoint, dtype=dtype)
    with torch.no_grad():
        found = changed(ids)
        assert found.dtype == dtype
        assert torch.equal(found, loaded(ids))
