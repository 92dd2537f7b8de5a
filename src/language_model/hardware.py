"""What the machine is, and what that decides."""

import platform

import torch


def device_type(accelerator: str) -> str:
    """Return what `trainer.accelerator` stands for on this machine: cuda, mps, cpu, ..."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def has_bf16_units(device: str) -> bool:
    """Whether matrix products in bfloat16 are fast on this kind of device here, not only possible."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        can = cpu_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def best_precision(device: str) -> str:
    """Return bf16-mixed where the hardware has units for it (float32 weights, same loss), else 32-true."""
    return "bf16-mixed" if has_bf16_units(device) else "32-true"


def describe(device: torch.device) -> str:
    """Return a device as a person would name it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index})"
    if device.type == "cpu":
        name = cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()
        return f"cpu ({name}, {torch.get_num_threads()} threads)"
    return str(device)


def cpu_capabilities() -> dict[str, object]:
    """Return what torch knows of this CPU; nothing where torch is too old to tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())
