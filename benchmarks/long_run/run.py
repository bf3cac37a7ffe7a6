"""An unattended run of 3,000 steps under torchrun on two data-parallel ranks, grown once and killed twice.

Prepares the data, starts one torchrun job, and kills one of its ranks (SIGKILL) after the steps of --kill-after.
torchrun restarts the ranks, which resume from the newest checkpoint. docs/long_run.md shows the log and the loss curve.
Run it from the root of the repository, in the environment that tests/run.sh creates.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("runs/long")
METRICS = FOLDER / "metrics.jsonl"
DATA = FOLDER / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-after", type=int, nargs="*", default=[730, 2310], help="steps")
    args = parser.parse_args()
    prepare()
    with (FOLDER / "log.txt").open("a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} torchrun starts\n")
        log.flush()
        job = start_job(log, len(args.kill_after) + 1)
        for step in args.kill_after:
            wait_for(step, job)
            victim = ranks_of(job.pid)[-1]
            log.write(f"{time.strftime('%H:%M:%S')} SIGKILL to process {victim} after step {last_step()}\n")
            log.flush()
            os.kill(victim, signal.SIGKILL)
        code = job.wait()
        log.write(f"{time.strftime('%H:%M:%S')} torchrun ends with code {code}\n")
    plot = [sys.executable, "tools/plot_run.py", METRICS, "--output", FOLDER / "loss.png"]
    subprocess.run([*plot, "--summary", FOLDER / "summary.md", "--title", "Killed twice, grown once"], check=True)
    return code


def prepare() -> None:
    """Prepare the tokenizer and the datasets if they are missing."""
    DATA.mkdir(parents=True, exist_ok=True)
    model = DATA / "tokenizer.model"
    text = Path("examples/data")
    if not model.exists():
        options = ["--input", text / "pile_sample_00.jsonl.zst", "--vocab-size", "4096"]
        run("tools/train_tokenizer.py", *options, "--output-prefix", model.with_suffix(""))
    for part, name in (("train", "pile_sample_00"), ("heldout", "pile_sample_heldout")):
        options = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--append-eod"]
        source = ["--input", text / f"{name}.jsonl.zst", "--output-prefix", DATA / part]
        run("tools/preprocess_data.py", *source, *options)


def run(*command) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True)


def start_job(log, restarts: int) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [*launcher, "-m", "megatron_tf.pretrain", "benchmarks/long_run/run.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def wait_for(step: int, job: subprocess.Popen) -> None:
    while last_step() < step:
        if job.poll() is not None:
            raise SystemExit(f"the job ended with code {job.returncode} before step {step}: see {FOLDER / 'log.txt'}")
        time.sleep(0.5)


def last_step() -> int:
    """Return the last step in the metrics file, or 0."""
    if not METRICS.exists():
        return 0
    lines = METRICS.read_bytes()[-4000:].splitlines()[1:]
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith(b"}")), default=0)


def ranks_of(agent: int) -> list[int]:
    """Return the process ids of torchrun's ranks."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(child) for child in children if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes()]


if __name__ == "__main__":
    sys.exit(main())
