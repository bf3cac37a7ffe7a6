"""Where one rank can't build its kernels, all ranks fall back or all end, for the same reason and at once."""

import dataclasses

import pytest

from megatron_tf.errors import UserError
from megatron_tf.kernels import dispatch
from megatron_tf.kernels.eager import EagerKernels
from megatron_tf.kernels.pattention import PattentionKernels
from megatron_tf.training.step.state import build_state
from tests.support.training import small_run, training_run


class Kernels(PattentionKernels):
    """As those that compile when they are called first: they count their calls and raise `error`."""

    name = "compiled"

    def __init__(self, error):
        self.error, self.calls = error, 0

    def forward(self, *arguments, **options):
        """See PattentionKernels."""
        self.calls += 1
        if self.error is not None:
            raise self.error
        return EagerKernels().forward(*arguments, **options)

    def backward(self, *arguments, **options):
        """See PattentionKernels."""
        return EagerKernels().backward(*arguments, **options)


def with_kernels(mesh, errors, function):
    """(what the function returns or a user's error, calls of the kernels): rank r's raise errors[r]."""
    rank, saved = mesh.world.rank(), dispatch.choose_pattention
    kernels = Kernels(errors[rank])
    dispatch.choose_pattention = lambda choice, device: kernels
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


def train(mesh, errors):
    curve = lambda mesh: training_run(mesh, small_run(), steps=3)[0]  # noqa: E731
    return with_kernels(mesh, errors, curve), curve(mesh)


def test_after_falling_back_nothing_calls_them_again(rank_pool):
    for (curve, calls), expected in rank_pool.run(train, 2, 1, 1, [FULL, None]):
        assert curve == expected
        assert calls <= 1
