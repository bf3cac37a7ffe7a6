"""Rank, world size and address of the rendezvous, from the environment of torchrun or Slurm, or from MPI."""

import os
import socket

from megatron_tf.errors import UserError
from megatron_tf.extras import how_to_install

FIRST_PORT = 20000
NUM_PORTS = 10000
"""MASTER_PORT of Slurm jobs, below the range of ephemeral ports; examples/slurm uses the same formula."""

_CONFINING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # each limits the GPUs


class LaunchError(UserError):
    """The launcher's environment lacks what ranks need to connect to each other, or contradicts itself."""


def adopt_launcher() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* under srun or mpiexec, as torchrun does.

    Raises LaunchError, which says what to do, if something is missing.
    """
    if "RANK" in os.environ:
        return
    if _slurm_tasks() > 1:
        _env_from_slurm()
    elif any(number_of(name) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        _env_from_mpi()


def job_name() -> str:
    """Return the job's id under its scheduler or launcher; empty if there is neither."""
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def number_of(name: str, default: int = 1) -> int:
    """Return the integer in the environment variable `name`. Raises LaunchError if it holds anything else."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"the environment variable {name} is {text!r}, which is not a number") from None


def device_index(local_rank: int, num_visible: int) -> int:
    """Choose this process's GPU among the `num_visible` ones that it sees.

    This is the GPU with the number of the process on its host, or the first GPU if each process sees only its own, as
    under `srun --gpus-per-task` and in containers. Raises LaunchError if there are fewer GPUs than processes.
    """
    per_task = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # or TYPE:NUMBER
    is_confined = num_visible == 1 and any(os.environ.get(name) for name in _CONFINING)
    if is_confined or per_task == str(num_visible):
        return 0
    if local_rank >= num_visible:
        raise LaunchError(
            f"process {local_rank} of this host (they count from 0) has no GPU, since it sees {num_visible}: start one "
            f"process for each GPU"
        )
    return local_rank


def _slurm_tasks() -> int:
    """Return the number of tasks of this Slurm job step; 1 outside Slurm. Clusters differ in the variables they set."""
    if "SLURM_PROCID" not in os.environ:
        return 1
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"):
        if name in os.environ:
            return number_of(name)
    if number_of("SLURM_PROCID") > 0:
        raise LaunchError(
            "started by srun as one of several tasks, but their number is unknown: "
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
    """Use MPI for the rendezvous only; the ranks then communicate as under torchrun."""
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
    variables = {"RANK": world.Get_rank(), "WORLD_SIZE": world.Get_size(), "LOCAL_RANK": node.Get_rank()}
    # read by torch.distributed; rank 0 has chosen address and port for all ranks
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
