"""What the machine can do, and the settings that follow: precision, attention, fused optimizer, compiling."""

import os
import platform
import re
import shutil
import sys
from importlib.util import find_spec

import torch


def device_type(accelerator: str) -> str:
    """Return the device type that `trainer.accelerator` means on this machine: cuda, mps, cpu, ..."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def find_device(accelerator: str) -> torch.device:
    """Return the device that `accelerator` means; ValueError if this machine has none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu", *([found.type] if found else [])]
    device = device_type(accelerator)
    if device not in here or (accelerator == "gpu" and found is None):
        raise ValueError(f"this machine has none; allowed: auto, {', '.join(here)}")
    return torch.device(device)


def has_bf16_units(device: str) -> bool:
    """Whether bfloat16 matrix products are fast on this device, not just possible."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        can = cpu_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def best_precision(device: str) -> str:
    """Return bf16-mixed (with float32 weights) where the hardware has units for it, else 32-true."""
    return "bf16-mixed" if has_bf16_units(device) else "32-true"


def full_precision_name(precision: str | int) -> str:
    """Return lightning's full name of a precision: 16-mixed for 16."""
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(
        str(precision), str(precision)
    )


def best_attention(device: str, precision: str, dropout: float) -> str:
    """Return "unfused" on a CPU in bfloat16 or with dropout, where torch's fused kernel is slower; else "fused"."""
    return "unfused" if device == "cpu" and (dropout > 0 or precision.startswith("bf16")) else "fused"


def can_fuse_optimizer(device: str, precision: str) -> bool:
    """Whether torch's fused optimizers work here; with float16 they do not: gradients are unscaled before clipping."""
    return device in ("cpu", "cuda", "mps", "xpu") and precision != "16-mixed"


def missing_for_compiling(device: str) -> str | None:
    """Return a description of what torch.compile needs and this machine lacks; None if nothing."""
    if device == "cuda":
        if find_spec("triton") is None:
            return "triton"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
            return "a GPU of compute capability 7.0 or later"
        if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
            return "a C compiler, such as gcc"
    if device == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if not shutil.which(os.environ.get("CXX", usual)):
            return f"a C++ compiler: {usual}, or what the variable CXX names"
    return None


def worth_compiling(device: str, steps: int | None) -> bool:
    """Whether compiling saves time: on GPUs, for 1,000 steps or more. It takes tens of seconds."""
    return device == "cuda" and (steps is None or steps >= 1000) and missing_for_compiling(device) is None


# Peak dense bfloat16 operations a second (the makers' data sheets, without sparsity), by a part of the device's name;
# the first match counts.
PEAK_BF16 = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return a device's peak operations a second in this precision; None if unknown."""
    if device.type != "cuda" or not precision.startswith("bf16"):
        return None
    words = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_BF16.items() if re.search(rf"\b{name}\b", words)), None)


def describe_device(device: torch.device) -> str:
    """Return a device's name for people."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index})"
    if device.type == "cpu":
        name = cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        threads = torch.get_num_threads()
        return f"cpu ({name}, {threads} thread{'s' if threads > 1 else ''})"
    return str(device)


def cpu_capabilities() -> dict[str, object]:
    """Return what torch knows about this CPU; empty if this torch is too old to tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())
