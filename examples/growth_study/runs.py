"""A run of the trainer, identified by its configuration."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the trainer."""

    arm: str
    family: str
    size: str
    kind: str
    """sweep; final, the point of an arm; or small, which only serves as a start of others."""
    budget: float
    rate: float
    seed: int
    is_main: bool
    config: Mapping[str, Any]
    """The configuration of the trainer without its paths."""
    schedule: Mapping[str, Any]
    """The keys of its first learning-rate schedule."""
    flops: float
    """FLOPs of this run, without those of its parent."""
    parent: "Run | None" = None

    @cached_property
    def id(self) -> str:
        """Hash of the whole configuration and of the run that this one starts from."""
        content = json.dumps([self.config, self.parent.id if self.parent else None], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step."""
        start = self.parent.steps[1] if self.parent else 0
        return start, int(self.config["training"]["train_iters"])

    @property
    def label(self) -> str:
        """What the run is, in words."""
        return f"{self.arm} budget {self.budget:g} seed {self.seed} lr {self.rate:g} ({self.kind})"


def unique(runs: Iterable[Run]) -> dict[str, Run]:
    """Return the runs, after their parents, by id: small budgets first, then main arms; final before small.

    A study that is stopped early has compared all arms at the small budgets.
    """
    ordered = sorted(runs, key=lambda run: (run.budget, not run.is_main, run.seed, run.family))
    found: dict[str, Run] = {}
    for run in ordered:
        if run.parent is not None:
            found.setdefault(run.parent.id, run.parent)
        if run.id not in found or found[run.id].kind == "small":
            found[run.id] = run
    return found
