"""Where one rank can't build its kernels, all ranks fall back or all end, for the same reason and at once."""

import dataclasses

import pytest

from megatron_tf.errors import UserError
from megatron_tf.kernels import dispatch
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.layouts import layout_config
from tests.support.training import random_batch, small_run, training_run


class Kernels(PattentionKernels):
    """As those that compile when they are called first: they count their calls, note the shapes of the scores and raise
    `error`."""

    name = "compiled"

    def __init__(self, error):
        self.error, self.calls, self.shapes = error, 0, set()

    def forward(self, norm, scores, **options):
        """See PattentionKernels."""
        self.calls += 1
        self.shapes.add(tuple(scores.shape))
        if self.error is not None:
            raise self.error
        return EagerKernels().forward(norm, scores, **options)

    def backward(self, *arguments, **options):
        """See PattentionKernels."""
        return EagerKernels().backward(*arguments, **options)


def with_kernels(mesh, errors, function):
    """(what the function returns or a user's error, calls of the kernels): rank r's raise errors[r]."""
    rank, saved = mesh.world.rank(), dispatch.choose_pattention
    kernels = Kernels(errors[rank])
    dispatch.choose_pattention = lambda choice, device, dtype: kernels
    try:
        return function(dataclasses.replace(mesh, local_rank=rank)), kernels.calls
    except UserError as error:
        return str(error), kernels.calls
    finally:
        dispatch.choose_pattention = saved


def build(mesh, choice, errors):
    def kernels(mesh):
        state = build_state(small_run(kernels={"pattention": choice}), mesh)
        return state.kernels.taken, state.kernels.warning, type(state.model.pattentions().popitem()[1].kernels).__name__

    return with_kernels(mesh, errors, kernels)


FULL = OSError(28, "No space left on device")
CAUSE = "No space left on device: set TORCHINDUCTOR_CACHE_DIR to a writable directory with free space"


@pytest.mark.parametrize("failing", [0, 1])
def test_auto_falls_back_on_every_rank(rank_pool, failing):
    errors = [FULL if rank == failing else None for rank in range(2)]
    answers = rank_pool.run(build, 2, 1, 1, "auto", errors)
    (taken, warning, used), _ = answers[0]
    assert answers[1][0] == answers[0][0]
    assert taken.startswith("pattention eager, ")
    assert used == "EagerKernels"
    assert warning.startswith("kernels.pattention: compiled kernels can't be built on host ")
    assert warning.endswith(f"{CAUSE}; auto falls back to eager")
    assert answers[failing][1] == 1
    assert failing == 1 or answers[1][1] == 0  # the others do not try after the first rank of their host


@pytest.mark.parametrize("failing", [0, 1])
def test_a_choice_ends_every_rank_with_the_same_line(rank_pool, failing):
    errors = [FULL if rank == failing else None for rank in range(2)]
    (first, _), (second, _) = rank_pool.run(build, 1, 1, 2, "compiled", errors)
    assert first == second
    assert first.startswith("kernels.pattention: compiled kernels can't be built on host ")
    assert first.endswith(f"{CAUSE}, or choose eager")


def shapes_of_scores(mesh, config):
    """Those that the kernels are built for, and those of a step."""

    def shapes(mesh):
        state = build_state(config, mesh)
        seen = next(iter(state.model.pattentions().values())).kernels.shapes
        built = set(seen)
        seen.clear()
        train_step(state, random_batch(config, 0, mesh), 1e-3)
        return built, seen

    return with_kernels(mesh, [None] * mesh.world.size(), shapes)[0]


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 1, 2)], ids=str)
def test_kernels_are_built_for_the_shapes_of_a_step(rank_pool, layout):
    for built, used in rank_pool.run(shapes_of_scores, *layout, layout_config(layout, layout[0] > 1)):
        assert len(used) == 3
        assert built == used


def train(mesh, errors):
    def curve(mesh, choice="auto"):
        return training_run(mesh, small_run(kernels={"pattention": choice}), steps=3)[0]

    return with_kernels(mesh, errors, curve), curve(mesh, "eager")


def test_after_falling_back_nothing_calls_them_again(rank_pool):
    for (curve, calls), expected in rank_pool.run(train, 2, 1, 1, [FULL, None]):
        assert curve == expected
        assert calls <= 1
