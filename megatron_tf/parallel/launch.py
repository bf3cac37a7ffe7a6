"""How ranks find their places: from torchrun's environment, from slurm's, or from MPI."""

import os
import socket

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install

FIRST_PORT = 20000
NUM_PORTS = 10000
"""Ports of jobs under slurm, below those that systems hand out by themselves; examples/slurm counts alike."""


class LaunchError(UserError):
    """The launcher did not say what ranks need to find each other."""


def adopt_launcher() -> None:
    """Let ranks started by srun or mpiexec look as those of torchrun do, by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    Raises LaunchError, with what to do, where something is missing.
    """
    if "RANK" in os.environ:
        return
    if _slurm_tasks() > 1:
        _env_from_slurm()
    elif any(number_of(name) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        _env_from_mpi()


def job_name() -> str:
    """What the scheduler or launcher calls this job; empty outside of any."""
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def number_of(name: str, default: int = 1) -> int:
    """The number in an environment variable. Raises LaunchError where it holds something else."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"the environment variable {name} is {text!r}, which is no number") from None


def _slurm_tasks() -> int:
    """Tasks of this job step; 1 outside of slurm. Which of the variables there are depends on the cluster."""
    if "SLURM_PROCID" not in os.environ:
        return 1
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        if name in os.environ:
            return number_of(name)
    if number_of("SLURM_PROCID") > 0:
        raise LaunchError(
            "started by srun as one of several tasks, and nothing says of how many: "
            "export SLURM_NTASKS in the batch script"
        )
    return 1


def _env_from_slurm() -> None:
    if "MASTER_ADDR" not in os.environ:
        raise LaunchError("started by srun without MASTER_ADDR: export it in the batch script (see examples/slurm)")
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(_slurm_tasks())
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    job = os.environ.get("SLURM_JOB_ID", "")
    port = FIRST_PORT + int(job) % NUM_PORTS if job.isdecimal() else FIRST_PORT  # two jobs can share a node
    os.environ.setdefault("MASTER_PORT", str(port))


def _env_from_mpi() -> None:
    """MPI is used for rendezvous only; the ranks then communicate as under torchrun."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise LaunchError(
            f"started by mpiexec, which needs mpi4py: {how_to_install('mpi4py')}, or start with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    is_one_node = node.Get_size() == world.Get_size()
    address, port = world.bcast(("127.0.0.1" if is_one_node else socket.gethostname(), _free_port()))
    places = {"RANK": world.Get_rank(), "WORLD_SIZE": world.Get_size(), "LOCAL_RANK": node.Get_rank()}
    # torch.distributed reads them; the first rank has chosen address and port for all
    os.environ.update({name: str(place) for name, place in places.items()})
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
