"""The table of peaks: names as drivers spell them; nothing is guessed."""

import pytest
import torch

from llmtrain.model.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name: str, teraflops: float) -> None:
    assert peak_flops(name, torch.bfloat16) == pytest.approx(teraflops * 1e12)
    assert peak_flops(name, "float16") == pytest.approx(teraflops * 1e12)
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",  # not the A10
        "NVIDIA A1000",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 XYZ",
        "Tesla T4",
        "cpu",
        "",
    ],
)
def test_unknown_devices_have_none(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None
