"""How ranks find their places: from torchrun's environment, from slurm's, or from MPI."""

import os
import socket


class LaunchError(ValueError):
    """The launcher did not say what ranks need to find each other."""


def adopt_launcher() -> None:
    """Let ranks started by srun or mpiexec look as those of torchrun do, by RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*.

    Raises LaunchError, with what to do, where something is missing.
    """
    if "RANK" in os.environ:
        return
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        _adopt_slurm()
    elif any(int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        _adopt_mpi()


def _adopt_slurm() -> None:
    if "MASTER_ADDR" not in os.environ:
        raise LaunchError("started by srun without MASTER_ADDR: export it in the batch script (see examples/slurm)")
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ.update({name: os.environ[source] for name, source in names.items()})
    os.environ.setdefault("MASTER_PORT", "29500")


def _adopt_mpi() -> None:
    """MPI serves for the ranks to find each other alone; they then communicate as under torchrun."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise LaunchError(
            "started by mpiexec, which needs mpi4py: pip install mpi4py, or start with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    is_one_node = node.Get_size() == world.Get_size()
    address, port = world.bcast(("127.0.0.1" if is_one_node else socket.gethostname(), _free_port()))
    places = {"RANK": world.Get_rank(), "WORLD_SIZE": world.Get_size(), "LOCAL_RANK": node.Get_rank()}
    os.environ.update({name: str(place) for name, place in places.items()})
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
