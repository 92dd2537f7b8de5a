import pytest
import torch

from language_model.training import hardware


@pytest.mark.parametrize(
    ("device", "capabilities", "cuda_has_bf16", "precision"),
    [
        ("cpu", {"avx512_bf16": True}, False, "bf16-mixed"),
        ("cpu", {"amx_bf16": True, "avx512_bf16": False}, False, "bf16-mixed"),
        ("cpu", {"avx512_bf16": False}, True, "32-true"),
        ("cpu", {}, True, "32-true"),
        ("cuda", {}, True, "bf16-mixed"),
        ("cuda", {"avx512_bf16": True}, False, "32-true"),
        ("mps", {"avx512_bf16": True}, True, "32-true"),
    ],
)
def test_precision_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, device: str, capabilities: dict, cuda_has_bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(hardware, "cpu_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or cuda_has_bf16
    )
    assert hardware.best_precision(device) == precision


@pytest.mark.parametrize(
    ("accelerator", "found", "device"),
    [("cpu", "cuda", "cpu"), ("auto", "cuda", "cuda"), ("gpu", "mps", "mps"), ("auto", None, "cpu")],
)
def test_what_an_accelerator_stands_for(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, found: str | None, device: str
) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device(found) if found else None
    )
    assert hardware.device_type(accelerator) == device


def test_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card X")
    assert hardware.describe_device(torch.device("cuda", 1)) == "Card X (cuda:1)"
    assert hardware.describe_device(torch.device("cpu")).endswith(", 1 thread)")  # as in every test
    assert hardware.describe_device(torch.device("mps")) == "mps"


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA A10G", "bf16-mixed", 70e12),
        ("NVIDIA A10", "bf16-mixed", 125e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA H200", "32-true", None),
        ("Card X", "bf16-mixed", None),
    ],
)
def test_the_peak_is_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda", 0), precision) == peak
    assert hardware.peak_flops(torch.device("cpu"), precision) is None


@pytest.mark.parametrize(
    ("device", "steps", "worth"),
    [("cuda", 1000, True), ("cuda", None, True), ("cuda", 999, False), ("cpu", 10**6, False)],
)
def test_compiling_is_worth_it_on_long_runs_on_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, steps: int | None, worth: bool
) -> None:
    monkeypatch.setattr(hardware, "missing_for_compiling", lambda device: None)
    assert hardware.worth_compiling(device, steps) == worth


@pytest.mark.parametrize(
    ("device", "precision", "dropout", "attention"),
    [("cpu", "bf16-mixed", 0.0, "unfused"), ("cpu", "32-true", 0.1, "unfused"), ("cpu", "32-true", 0.0, "fused"),
     ("cuda", "bf16-mixed", 0.1, "fused"), ("cuda", "32-true", 0.0, "fused")],
)  # fmt: skip
def test_plain_attention_is_for_cpus(device: str, precision: str, dropout: float, attention: str) -> None:
    assert hardware.best_attention(device, precision, dropout) == attention


@pytest.mark.parametrize(
    ("device", "there", "missing"),
    [("cpu", {"g++", "clang++", "cl"}, None), ("cpu", {"gcc"}, "a C++ compiler"), ("cuda", {"triton", "clang"}, None),
     ("cuda", {"gcc"}, "triton"), ("cuda", {"triton"}, "a C compiler"), ("mps", set(), None)],
)  # fmt: skip
def test_what_compiling_needs(
    monkeypatch: pytest.MonkeyPatch, device: str, there: set[str], missing: str | None
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module, name in ((hardware.shutil, "which"), (hardware, "find_spec")):
        monkeypatch.setattr(module, name, lambda asked: asked if asked in there else None)
    said = hardware.missing_for_compiling(device)
    assert said is None if missing is None else said.startswith(missing)
    assert not missing or not hardware.worth_compiling(device, 10**6)


def test_no_compiler_but_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "C++" in hardware.missing_for_compiling("cpu")


@pytest.mark.parametrize(("short", "full"), [(16, "16-mixed"), ("bf16", "bf16-mixed"), (32, "32-true"),
                                             ("32-true", "32-true"), ("64", "64-true")])  # fmt: skip
def test_precisions_have_one_name(short: str | int, full: str) -> None:
    assert hardware.full_precision_name(short) == full


def test_float16s_gradients_are_not_for_a_fused_optimizer() -> None:
    assert hardware.can_fuse_optimizer("cuda", "bf16-mixed")
    assert not hardware.can_fuse_optimizer("cuda", "16-mixed")
    assert not hardware.can_fuse_optimizer("tpu", "bf16-mixed")
