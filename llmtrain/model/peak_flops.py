"""Peak arithmetic of accelerators, for MFU (model FLOPs utilisation, PaLM, arXiv:2204.02311). Without torch.

Figures are the makers' own for dense bfloat16 matrix products with float32 accumulation. Data sheets often print the
number "with sparsity": that is halved here.
"""

import re

_BF16_TERAFLOPS: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 data sheet (June 2021): BFLOAT16 tensor core 312. The A800 differs in NVLink only.
    (r"\bA[18]00\b", 312.0),
    # NVIDIA A30 data sheet: 165.
    (r"\bA30\b", 165.0),
    # NVIDIA A40 data sheet: 149.7.
    (r"\bA40\b", 149.7),
    # NVIDIA A10 data sheet: 125. (The A10G is another, slower product, whose figure NVIDIA does not publish.)
    (r"\bA10\b", 125.0),
    # NVIDIA RTX A6000 data sheet: 309.7 with sparsity.
    (r"\bRTX A6000\b", 154.8),
    # NVIDIA L4 data sheet: 242 with sparsity.
    (r"\bL4\b", 121.0),
    # NVIDIA L40 data sheet: 181.05 (362.1 with sparsity).
    (r"\bL40\b", 181.05),
    # NVIDIA L40S data sheet: 362.05 (733 with sparsity).
    (r"\bL40S\b", 362.05),
    # NVIDIA H100 data sheet, with sparsity: SXM 1,979, PCIe 1,513 (first edition), NVL 1,671. The H800 is as fast.
    (r"\bH[18]00 PCIe\b", 756.5),
    (r"\bH[18]00 NVL\b", 835.5),
    (r"\bH[18]00( SXM\d?| \d+GB HBM\d\w?)?$", 989.5),
    # NVIDIA H200 data sheet, with sparsity: SXM 1,979, NVL 1,671.
    (r"\bH200 NVL\b", 835.5),
    (r"\bH200( SXM\d?)?$", 989.5),
    # NVIDIA GH200 data sheet: 990 (1,979 with sparsity).
    (r"\bGH200\b", 989.5),
    # NVIDIA H20: 148.
    (r"\bH20\b", 148.0),
    # NVIDIA DGX B200 data sheet: 36 petaFLOPS FP16/BF16 with sparsity on 8 GPUs.
    (r"\bB200\b", 2250.0),
    # NVIDIA GB200 NVL72 data sheet: 360 petaFLOPS FP16/BF16 with sparsity on 72 GPUs.
    (r"\bGB200\b", 2500.0),
    # NVIDIA Ada and Ampere GeForce white papers: FP16/BF16 tensor with FP32 accumulate, dense.
    (r"\bGeForce RTX 4090$", 165.2),
    (r"\bGeForce RTX 3090$", 71.0),
    # AMD Instinct data sheets: MI250X 383, MI300X 1,307.4.
    (r"\bMI250X\b", 383.0),
    (r"\bMI300X\b", 1307.4),
)


def peak_flops(device_name: str, dtype: object = "bfloat16") -> float | None:
    """Floating-point operations a second that the device can do at most.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: of the matrix products, a torch.dtype or its name. Of bfloat16 and float16 (equally fast) only: what
            float32 reaches depends on whether TensorFloat-32 is allowed.

    Returns:
        The dense peak; None where it is not known, and for a slice of a device (MIG): then there is no MFU to report.
    """
    if str(dtype).removeprefix("torch.") not in ("bfloat16", "float16") or "MIG" in device_name:
        return None
    for pattern, teraflops in _BF16_TERAFLOPS:
        if re.search(pattern, device_name.strip()):
            return teraflops * 1e12
    return None
