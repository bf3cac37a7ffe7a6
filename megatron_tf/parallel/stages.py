"""Pipeline stages: which layers each one has, and which rank runs it."""

import itertools
from collections.abc import Sequence

from megatron_tf.parallel.mesh import LayoutError


def partition_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Partition layers into contiguous, non-empty stages that minimize the cost of the most expensive stage.

    Raises LayoutError if there are more stages than layers.
    """
    layers = len(costs)
    if num_stages > layers:
        raise LayoutError(f"{num_stages} pipeline stages for {layers} layer(s): every stage needs a layer")
    # best[i] = (cost of the most expensive stage, cuts) of layers [0, i) in as many stages as iterations so far
    best = {0: (0.0, [0])}
    for stage in range(num_stages):
        following = {}
        for stop in range(stage + 1, layers + 1):
            cuts = [
                (max(highest, sum(costs[start:stop])), [*starts, stop])
                for start, (highest, starts) in best.items()
                if start < stop
            ]
            # by cost, then by cuts: every rank has to break ties in the same way
            following[stop] = min(cuts)
        best = following
    return [range(start, stop) for start, stop in itertools.pairwise(best[layers][1])]


def consecutive_ranges(sizes: Sequence[int]) -> list[range]:
    """Return ranges of these sizes, one after the other from 0."""
    ends = [0, *itertools.accumulate(sizes)]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def stages_of_rank(rank: int, *, ranks: int, per_rank: int, is_v: bool) -> list[int]:
    """Return the stages that a pipeline rank runs, in order.

    Stages are dealt to the ranks in a loop, 0 1 2 0 1 2, or with `is_v` back and forth, 0 1 2 2 1 0.
    """
    turns = range(per_rank)
    return [turn * ranks + (ranks - 1 - rank if is_v and turn % 2 else rank) for turn in turns]
