"""A model shared by ranks gives the tokens and logits of one process."""

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.model import load_model
from megatron_tf.inference.sampling import Sampling
from tests.support.models import random_model, write_checkpoint
from tests.support.ranks import RankPool
from tests.support.training import STRONG

PROMPTS = [[5, 9, 100], list(range(40, 57)), [7]]


def generate(mesh, root, sampling, seed):
    """(tokens of each step, logits of a prompt, parameters held) on this rank."""
    model = load_model(root, group=mesh.group("tp"))
    generation = Generation(model, PROMPTS, sampling, seed=seed)
    steps = [generation.step() for _ in range(20)]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]]))
    return steps, logits.numpy(), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("keys", [{}, STRONG], ids=["tokenformer", "strong transformer"])
def test_tensor_parallel_ranks_give_the_tokens_of_one_process(rank_pool: RankPool, tmp_path, keys):
    root = write_checkpoint(tmp_path / "run", random_model(**keys))
    for sampling in (Sampling(temperature=0), Sampling(1.3, 100, 0.9)):
        ((steps, logits, count),) = rank_pool.run(generate, 1, 1, 1, root, sampling, 4)
        for size in (2, 4):
            for found, found_logits, found_count in rank_pool.run(generate, size, 1, 1, root, sampling, 4):
                assert found == steps
                assert abs(found_logits - logits).max() < 1e-4 * abs(logits).max()
                assert found_count < 1.1 * count / size


def refusal(mesh, root):
    """What loading says on ranks that can't share the model."""
    try:
        load_model(root, group=mesh.group("tp"))
    except UserError as error:
        return str(error)
    return None


def test_ranks_that_can_not_share_the_model_evenly_say_why(rank_pool: RankPool, tmp_path):
    root = write_checkpoint(tmp_path / "run", random_model())
    wanted = "num_attention_heads (4) must be divisible by parallel.tensor_model_parallel_size (3)"
    assert all(wanted in found for found in rank_pool.run(refusal, 3, 1, 1, root))
