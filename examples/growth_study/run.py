"""Run the study: every run of study.yaml that is not in results/ yet, several at a time with one thread each.

    python examples/growth_study/run.py --sweep            # 4 learning rates for each arm
    python examples/growth_study/run.py --final            # once the rates are chosen
    python examples/growth_study/run.py --final --minutes 170 --only tokenformer_262k

It can be stopped at any time, by Ctrl-C or kill: the same command resumes from the checkpoints of the unfinished runs.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from jobs import Data
from plan import Plan
from records import Results
from runner import Runner, say
from runs import unique
from study import Study
from sweeps import describe_rates

from megatron_tf.commands.runner import command
from megatron_tf.errors import UserError
from megatron_tf.files import take_lock

HERE = Path(__file__).parent
_LOCK_SECONDS = 120.0


@command()
def main(arguments: list[str] | None = None) -> int:
    """Run what is missing. Returns 1 if a run failed, 75 if it was stopped by --minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--study", type=Path, default=HERE / "study.yaml", help="the study (default: %(default)s)")
    add(
        "--data",
        type=Path,
        default=Path("runs/growth_study/data"),
        help="directory of prepare.py (default: %(default)s)",
    )
    add("--runs", type=Path, default=Path("runs/growth_study/runs"), help="working directory (default: %(default)s)")
    add("--results", type=Path, default=HERE / "results", help="directory of the results (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--only", nargs="+", metavar="ARM", help="only these arms, with the small runs that they grow from")
    add("--minutes", type=float, help="stop after this time; unfinished runs are saved")
    add("--list", action="store_true", help="show what would run, and stop")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--sweep", action="store_true", help="the runs that choose a learning rate for each arm")
    kinds.add_argument("--final", action="store_true", help="the runs at the chosen rates")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    study = Study.read(options.study)
    if options.only and (unknown := sorted(set(options.only) - {*study.arms})):
        raise UserError(f"--only: no such arm: {', '.join(unknown)}; the study has {', '.join(study.arms)}")
    plan, results = Plan(study), Results(options.results)
    selected = [
        run for run in (plan.sweep() if options.sweep else plan.final()) if not options.only or run.arm in options.only
    ]
    runner = Runner(unique(selected), unique([*plan.sweep(), *plan.final()]), results=results, directory=options.runs)
    say(runner.summary(options.jobs))
    if options.final and (waiting := plan.waiting()):
        say(f"no rate is chosen yet for {len(waiting)} arms: {', '.join(waiting)}")
    if options.list:
        for run in runner.todo.values():
            say(f"  {run.id}  {run.label}  steps {run.steps[0]:,} to {run.steps[1]:,}  {run.flops:.3g} FLOPs")
        return 0
    data = Data(options.data)
    results.check_data(data.hash, chosen=study.chosen_rates)
    options.runs.mkdir(parents=True, exist_ok=True)
    lock = os.open(options.runs / "lock", os.O_CREAT | os.O_RDWR)  # its runs hold it too
    if not take_lock(lock, _LOCK_SECONDS):
        raise UserError(f"{options.runs} is in use: another run.py, or a run that it started, still works there")
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else None
    code = runner.work(jobs=options.jobs, data=data, machine=study.machine, deadline=deadline, lock=lock)
    if options.sweep:
        say(describe_rates(study, results))
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C: the jobs are stopped on the way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
