"""A real single-host Slurm cluster with its own files, ports and key.

It needs root and the Debian packages slurm-wlm and munge.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.commands import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
MpiDefault=none
JobRequeue=1
SchedulerParameters=batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why no cluster can be started; empty if one can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {missing[0]}: `apt-get install slurm-wlm munge` as root"
    return "" if os.geteuid() == 0 else "slurmd only runs as root"


class Cluster:
    """Submits and queries jobs, in `environment`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str | Path) -> str:
        """Run a Slurm command and return its standard output."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str | Path) -> str:
        """Submit a job with `sbatch ARGUMENTS` and return its id."""
        return self.run("sbatch", "--parsable", *arguments)

    def job(self, number: str) -> dict[str, str]:
        """Return what scontrol shows about a job: JobState, Restarts, ExitCode, ..."""
        fields = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of the states, and return what scontrol shows about it."""
        limit = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < limit, job
            time.sleep(0.5)
        return job


@contextlib.contextmanager
def slurm_cluster(environment: dict[str, str]):
    """Run a cluster within the context; its logs are in `folder`."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # socket paths have a small maximum length
    for part in ("state", "spool"):
        (folder / part).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(bytes(range(128)))
    host = socket.gethostname().split(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    text = CONFIG.format(folder=folder, host=host, user=getpass.getuser(), **ports)
    (folder / "slurm.conf").write_text(text)
    cluster = Cluster(folder, environment)
    files = {name: folder / f"munge.{name}" for name in ("socket", "key", "pid", "log", "seed")}
    munge = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-i"], ["slurmd", "-D"]]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for command in daemons:
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, cwd=folder)
            stack.callback(_end, process)
            _wait_for(folder / "munge.socket", process)
        _wait_for_node(cluster)
        stack.callback(_cancel_all, cluster)  # the processes of a job outlive the daemons
        yield cluster


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < limit, f"{process.args} makes no {path}"
        time.sleep(0.1)


def _wait_for_node(cluster: Cluster) -> None:
    limit = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            if cluster.run("sinfo", "-h", "-o", "%t") == "idle":
                return
        logs = {path.name: path.read_text()[-2000:] for path in cluster.folder.glob("*.out")}
        assert time.monotonic() < limit, f"the node does not become idle: {logs}"
        time.sleep(0.5)


def _cancel_all(cluster: Cluster) -> None:
    limit = time.monotonic() + 60
    while jobs := cluster.run("squeue", "-h", "-o", "%A").split():
        cluster.run("scancel", *jobs)
        assert time.monotonic() < limit, jobs
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
