"""Peak rates of GPUs, by the names that torch gives them."""

import pytest
import torch

from megatron_tf.training.observability import throughput
from tests.support.training import small_run

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_known_gpu_has_the_dense_rate_of_its_data_sheet(name, teraflops):
    assert throughput.flops_by_name(name) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA A100X",
        "NVIDIA A10G",
        "NVIDIA A10M",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "",
    ],
)
def test_a_similar_name_is_another_gpu(name):
    assert throughput.flops_by_name(name) is None


def test_the_configured_rate_comes_first_and_fp32_and_fp64_have_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    peak = lambda **changes: throughput.peak_flops(small_run(**changes), CUDA)  # noqa: E731
    assert peak(training={"precision": "bf16"}) == 756.5e12
    assert peak(training={"precision": "fp32"}) is None
    assert peak(training={"precision": "fp64"}) is None
    assert peak(training={"precision": "bf16"}, logging={"peak_teraflops": 3}) == 3e12


def test_a_run_on_a_gpu_that_is_not_known_says_so_and_what_to_set(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    bf16 = {"precision": "bf16"}
    assert throughput.why_no_mfu(small_run(training=bf16), CUDA) == (
        "no MFU: the peak FLOP/s of NVIDIA T4 in bf16 is unknown: set logging.peak_teraflops"
    )
    assert not throughput.why_no_mfu(small_run(training=bf16, logging={"peak_teraflops": 65}), CUDA)
    assert not throughput.why_no_mfu(small_run(training=bf16), torch.device("cpu"))
