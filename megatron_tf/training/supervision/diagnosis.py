"""Which ranks block a run, from two snapshots of the ranks' heartbeats."""

from collections.abc import Mapping, Sequence

from megatron_tf.training.supervision.heartbeats import Heartbeat

Beats = Mapping[int, Heartbeat | None]

_LISTED = 4  # ranks that a message lists


def responding(before: Beats, after: Beats) -> list[int]:
    """Return the ranks that could report a fault: their heartbeats continue."""
    return [
        rank
        for rank, beat in after.items()
        if beat is not None and beat != before[rank] and not beat.has_ended and not beat.has_left
    ]


def explain(before: Beats, after: Beats, *, rank: int, symptom: str) -> str | None:
    """Describe the ranks that the others wait for, from two snapshots of all heartbeats some seconds apart.

    These are the ranks whose heartbeat stopped, else those that failed, else those that are not waiting. Ranks that
    left the report to another rank count as if their last heartbeat continued. Returns None if a lower responding
    rank reports it.
    """
    able = responding(before, after)
    if able and rank != min(able):
        return None
    ended = [r for r, beat in after.items() if beat is not None and beat.has_ended]
    left = [r for r, beat in after.items() if r in able or (beat is not None and beat.has_left)]
    silent = [r for r in after if r not in ended and r not in left]
    busy = [r for r in left if (beat := after[r]) is not None and not beat.is_waiting]
    if silent:
        return f"{_list(silent, after, 'is gone or frozen, last heard of in')} {symptom}"
    if ended:
        return f"{_list(ended, after, 'has')} {symptom}"
    if busy and len(busy) < len(left):
        return f"{_list(busy, after, 'keeps the others waiting, in')} {symptom}"
    return f"all ranks are blocked: {_list(left, after, 'is in')} {symptom}"


def _list(ranks: Sequence[int], beats: Beats, verb: str) -> str:
    texts = []
    for rank in ranks[:_LISTED]:
        beat = beats[rank]
        if beat is None:
            texts.append(f"rank {rank} never started")
        else:
            where = f", at {beat.place}" if beat.place else ""
            duration = "" if beat.has_ended else f" for {beat.seconds:.0f} s"
            texts.append(f"rank {rank} (host {beat.host}, pid {beat.process}) {verb} {beat.operation}{duration}{where}")
    more = len(ranks) - _LISTED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")
