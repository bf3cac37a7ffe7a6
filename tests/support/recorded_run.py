"""Trains like megatron_tf.pretrain, and records the targets that every step is handed.

python -m tests.support.recorded_run RECORDS CONFIG [OVERRIDES]. Each rank appends a line a step to RECORDS.rank:
[sample numbers, targets of each sample]. `KILL_AFTER=n` ends the process as kill -9 does after n steps of the job;
`SKIP=s` makes the loss of the batch that begins with sample s non-finite.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

from megatron_tf import pretrain
from megatron_tf.training.run import loop
from megatron_tf.training.step.step import StepResult, train_step


class Recorder:
    def __init__(self, path):
        self.path = Path(f"{path}.{os.environ.get('RANK', '0')}")
        self.kill_after = int(os.environ.get("KILL_AFTER", "-1"))
        self.skip = int(os.environ.get("SKIP", "-1"))
        self.steps = 0

    def step(self, state, batch, **options):
        numbers = batch.sample_numbers.flatten().tolist()
        targets = batch.ids[..., 1:].flatten(end_dim=-2).tolist()
        with self.path.open("a") as file:
            file.write(json.dumps([numbers, targets]) + "\n")
        if self.steps == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1
        if batch.sample_numbers.min() - state.mesh.rank("dp") * batch.sample_numbers.shape[-1] == self.skip:
            return StepResult(math.nan, math.nan, nonfinite={"loss": 0})
        return train_step(state, batch, **options)


def read_records(folder, name):
    """sample -> its targets, over all ranks and jobs, which must agree on every sample that several of them read."""
    found = {}
    for path in sorted(folder.glob(f"{name}.[0-9]*")):
        for numbers, targets in map(json.loads, path.read_text().splitlines()):
            for number, of_sample in zip(numbers, targets, strict=True):
                assert found.setdefault(number, of_sample) == of_sample, number
    return found


if __name__ == "__main__":
    loop.train_step = Recorder(sys.argv[1]).step
    sys.exit(pretrain.main(sys.argv[2:]))
