"""Which GPU a process takes: that of its number on the host, or the only ones it sees."""

from datetime import timedelta

import pytest
import torch

from megatron_tf.parallel import mesh
from megatron_tf.parallel.launch import LaunchError, device_index

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}
VARIABLES = (*TORCHRUN, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, of those that matter, and no others."""

    def change(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("variables", "num_visible", "index"),
    [
        ({}, 8, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 3),
        ({"CUDA_VISIBLE_DEVICES": "5"}, 1, 0),  # a wrapper that gives each process one
        ({"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "h100:1"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 2, 0),
        ({"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 3),  # --gpu-bind=none: it sees all
        ({"ROCR_VISIBLE_DEVICES": "2"}, 1, 0),
    ],
)
def test_the_fourth_process_of_a_host_takes(environment, variables, num_visible, index):
    environment(**variables)
    assert device_index(3, num_visible) == index


@pytest.mark.parametrize(("variables", "num_visible"), [({}, 1), ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2)])
def test_more_processes_than_gpus_is_an_error(environment, variables, num_visible):
    environment(**variables)
    with pytest.raises(LaunchError, match=rf"process 3 of this host .* sees {num_visible}: start one process for each"):
        device_index(3, num_visible)


def test_the_mesh_takes_it(environment, monkeypatch):
    environment(**TORCHRUN, CUDA_VISIBLE_DEVICES="5")
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    found = mesh.init_mesh(tensor=1, pipeline=1, data=None, timeout=timedelta(seconds=1))
    assert found.device == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]
