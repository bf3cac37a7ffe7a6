"""Runs what a study is missing, several runs at a time, each after the one that it grows from."""

import time
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import fmean

from jobs import Data, Job, has_checkpoint, remove
from records import Results
from runs import Run
from study import Machine

_POLL_SECONDS, _SAY_SECONDS = 0.2, 60.0


class Runner:
    """Runs what is missing of `runs`; the checkpoints that any of `everything` still needs are kept."""

    def __init__(
        self, runs: Mapping[str, Run], everything: Mapping[str, Run], results: Results, directory: Path
    ) -> None:
        self.everything = everything
        self.results = results
        self.directory = directory
        self.todo = {run.id: run for run in runs.values() if run.kind != "small" and run.id not in results.by_id}
        parents = [run.parent for run in self.todo.values() if run.parent is not None]
        lacking = {run.id for run in parents if run.id not in results.by_id or not has_checkpoint(directory, run)}
        self.todo = {run.id: run for run in runs.values() if run.id in self.todo or run.id in lacking}
        self.failed: list[Job] = []
        self.overheads = [0.0]
        """Seconds of each finished job besides its steps: starts, and the evaluation on the held-out text."""

    def summary(self, jobs: int, active: Sequence[Job] = ()) -> str:
        """Return how many runs are finished, and the time that the others will take."""
        done = {job.run.id: job.progress() for job in active}
        left = sum(run.flops * (1 - done.get(run.id, 0.0)) / self._speed(run) for run in self.todo.values())
        left += len(self.todo) * fmean(self.overheads[1:] or self.overheads)
        hours = f"{left / 3600:.1f} core-hours left, {left / 3600 / jobs:.1f} hours with {jobs} jobs"
        known = hours if self.results.by_id else "the time left is known once a run has finished"
        return f"{len(self.results.by_id)} results, {len(self.todo)} runs to do; {known}"

    def _speed(self, run: Run) -> float:
        """Return the FLOPs per second measured on the runs of the same model, or of all models."""
        known = [result for result in self.results.by_id.values() if result["seconds"] > 0]
        same = [result for result in known if (result["family"], result["size"]) == (run.family, run.size)]
        measured = same or known
        flops = sum(self._own_flops(result["id"], result["flops"]) for result in measured)
        return flops / sum(result["seconds"] for result in measured) if measured else 1.0

    def _own_flops(self, identity: str, total: float) -> float:
        parent = self.results.by_id.get(self.results.by_id[identity]["parent"] or "")
        return total - (parent["flops"] if parent else 0.0)

    def work(self, *, jobs: int, data: Data, machine: Machine, deadline: float | None, lock: int) -> int:
        """Run until all is done, the deadline, or Ctrl-C; return the exit code."""
        graph: TopologicalSorter[str] = TopologicalSorter()
        for run in self.todo.values():
            graph.add(run.id, *([run.parent.id] if run.parent and run.parent.id in self.todo else []))
        graph.prepare()
        priority = {identity: number for number, identity in enumerate(self.todo)}
        waiting: list[str] = []
        active: list[Job] = []
        said = time.monotonic()
        try:
            while True:
                waiting = sorted([*waiting, *graph.get_ready()], key=priority.__getitem__)
                while waiting and len(active) < jobs:
                    run = self.todo[waiting.pop(0)]
                    active.append(Job(run, self.directory, data=data, machine=machine, inherited=[lock]))
                    say(f"start   {run.id}  {run.label}")
                if not active:
                    break
                time.sleep(_POLL_SECONDS)
                for job in [job for job in active if job.poll() is not None]:
                    active.remove(job)
                    if self._finish(job):
                        graph.done(job.run.id)
                    said = 0.0
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    parts = ", ".join(f"{job.run.arm} {job.progress():.0%}" for job in active)
                    say(f"{self.summary(jobs, active)}{f'; at work: {parts}' if parts else ''}")
                if deadline is not None and time.monotonic() > deadline:
                    say("the time is over")
                    return 75
        finally:
            _stop(active)
        for job in self.failed:
            say(f"failed: {job.run.id}  {job.run.label}: {job.why()}; see {job.log}")
        return 1 if self.failed else 0

    def _finish(self, job: Job) -> bool:
        """Record the result of a job and remove what nobody needs; return whether it succeeded."""
        if job.poll() != 0:
            say(f"FAILED  {job.run.id}  {job.run.label} with code {job.poll()}: {job.why()}; see {job.log}")
            self.failed.append(job)
            return False
        result = job.result()
        if result["id"] not in self.results.by_id:  # otherwise only its checkpoint was missing
            self.results.add(result)
        self.todo.pop(job.run.id)
        self.overheads.append(max(0.0, time.monotonic() - job.started - result["seconds"]))
        say(f"done    {job.run.id}  {job.run.label}: loss {result['loss']:.4f} in {result['seconds']:.0f} s")
        self._remove_unneeded()
        return True

    def _remove_unneeded(self) -> None:
        needed = {run.parent.id for run in self.everything.values() if run.parent and run.id not in self.results.by_id}
        for identity in self.results.by_id:
            if identity not in needed and identity not in self.todo and (self.directory / identity).exists():
                remove(self.directory / identity)


def _stop(active: list[Job]) -> None:
    """Let the jobs save, and wait for them."""
    for job in active:
        say(f"stop    {job.run.id}  {job.run.label} at {job.progress():.0%}; the same command resumes it")
        job.stop()
    for job in active:
        job.process.wait()


def say(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
