"""What a GPU host lacks is said before ranks join, in words an operator can act on."""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_forward import exchange
from moe_forward.errors import StartError
from moe_forward.exchange import gpu_checks, nccl
from moe_forward.exchange.nvlink import without_nvlink

GPU = torch.device("cuda", 1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A host of 4 GPUs that all reach each other; `used` is the device made current."""
    host = SimpleNamespace(gpus=4, blocked=set(), free=8 << 30, used=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: host.gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: host.gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(host, "used", device))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) not in host.blocked)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (host.free, 141 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"u{index}"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return host


def test_a_rank_uses_the_gpu_it_was_given(host: SimpleNamespace) -> None:
    gpu_checks.use_device(GPU)
    assert host.used == GPU


@pytest.mark.parametrize(
    ("gpus", "message"),
    [(0, "cuda:1, but torch .* finds no usable CUDA GPU"), (1, r"cuda:1, but 1 GPU\(s\) are visible to it \(CUDA_VIS")],
)
def test_a_gpu_that_is_not_there_is_named(host: SimpleNamespace, gpus: int, message: str) -> None:
    host.gpus = gpus
    with pytest.raises(StartError, match=message):
        gpu_checks.use_device(GPU)
    assert host.used is None


def test_gpus_out_of_reach_are_named(host: SimpleNamespace) -> None:
    host.blocked = {(1, 0), (1, 3)}
    assert "cuda:1 has no peer access to cuda:0, cuda:3" in gpu_checks.check_peers(GPU, ranks=4)


def test_gpus_that_the_group_does_not_need_may_be_out_of_reach(host: SimpleNamespace) -> None:
    host.blocked = {(1, 0), (1, 3)}
    assert gpu_checks.check_peers(GPU, ranks=2) == ""
    host.blocked = set()
    assert gpu_checks.check_peers(GPU, ranks=8) == "", "ranks on other hosts cannot be asked"


def test_memory_that_does_not_suffice_is_told_in_numbers(host: SimpleNamespace) -> None:
    gpu_checks.check_memory(8 << 30, GPU, "the buffer")
    message = "the buffer needs 8193 MiB on cuda:1, where 8192 of 144384 MiB are free: lower max_step_tokens"
    with pytest.raises(StartError, match=message):
        gpu_checks.check_memory((8 << 30) + (1 << 20), GPU, "the buffer")


class FakeNccl:
    def __init__(self, version: int) -> None:
        self.version = version

    def ncclGetVersion(self, where: Any) -> int:
        where._obj.value = self.version
        return 0


@pytest.mark.parametrize("version", [23004, 23007])
def test_an_nccl_that_deepep_works_with_is_taken(version: int) -> None:
    gpu_checks.check_nccl_version(FakeNccl(version))  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "dotted"), [(22809, "2.28.9"), (23003, "2.30.3"), (23100, "2.31.0")])
def test_another_nccl_is_refused_with_both_versions(version: int, dotted: str) -> None:
    with pytest.raises(StartError, match=rf"2\.30\.4 or newer, below 2\.31\.0, and the process has loaded {dotted}"):
        gpu_checks.check_nccl_version(FakeNccl(version))  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a torch for GPUs has loaded NCCL")
def test_a_torch_without_nccl_is_said() -> None:
    with pytest.raises(StartError, match="has not loaded NCCL"):
        gpu_checks.check_nccl_version()


def test_missing_cuda_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("EP_JIT_NVCC_COMPILER", raising=False)
    message = f"{tmp_path}/bin/nvcc and {tmp_path}/bin/cuobjdump: install"
    with pytest.raises(StartError, match=message):
        gpu_checks.check_compiler()
    (tmp_path / "bin").mkdir()
    for tool in ("nvcc", "cuobjdump"):
        (tmp_path / "bin" / tool).touch()
    gpu_checks.check_compiler()


def test_without_a_network_card_deepep_is_told_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(gpu_checks, "INFINIBAND", tmp_path / "none")
    gpu_checks.disable_gin_without_nic()
    assert os.environ == {"EP_DISABLE_GIN": "1"}


@pytest.mark.parametrize(("card", "given"), [("mlx5_0", {}), ("", {"EP_DISABLE_GIN": "0"})])
def test_a_card_or_a_given_choice_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str, given: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(gpu_checks, "INFINIBAND", tmp_path)
    if card:
        (tmp_path / card).touch()
    gpu_checks.disable_gin_without_nic()
    assert os.environ == given


class FakeNvml:
    """Answers as libnvidia-ml does: 0 for success, 0 for a link that is there."""

    def __init__(self, unlinked: set[str], broken: str = "") -> None:
        self.unlinked, self.broken, self.open = unlinked, broken, 0
        self.names: list[str] = []

    def __getattr__(self, call: str) -> Any:
        return lambda *arguments: 999 if call == self.broken else getattr(self, f"do_{call}")(*arguments)

    def do_nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def do_nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def do_nvmlDeviceGetHandleByUUID(self, uuid: ctypes.c_char_p, handle: Any) -> int:
        assert uuid.value is not None
        self.names.append(uuid.value.decode())
        handle._obj.value = len(self.names)
        return 0

    def do_nvmlDeviceGetP2PStatus(self, one: ctypes.c_void_p, other: ctypes.c_void_p, what: Any, status: Any) -> int:
        assert what.value == 2, "NVML_P2P_CAPS_INDEX_NVLINK"
        status._obj.value = 1 if self.names[(other.value or 0) - 1] in self.unlinked else 0
        return 0


def test_gpus_without_nvlink_are_found() -> None:
    nvml = FakeNvml({"GPU-c"})
    assert without_nvlink("GPU-a", ["GPU-b", "GPU-c", "GPU-d"], nvml) == ["GPU-c"]  # type: ignore[arg-type]
    assert nvml.open == 0


def test_an_nvml_that_fails_says_in_which_call() -> None:
    nvml = FakeNvml(set(), broken="nvmlDeviceGetP2PStatus")
    with pytest.raises(OSError, match="nvmlDeviceGetP2PStatus of libnvidia-ml failed with code 999"):
        without_nvlink("GPU-a", ["GPU-b"], nvml)  # type: ignore[arg-type]
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("unlinked", "warning"),
    [
        (["GPU-u3"], "cuda:1 has no NVLink to GPU-u3: tokens to ranks there travel over PCIe"),
        (OSError("no such library"), "cuda:1: cannot find out about NVLink: no such library"),
        ([], ""),
    ],
)
def test_missing_nvlink_is_a_warning(
    host: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unlinked: Any,
    warning: str,
) -> None:
    def answer(mine: str, others: list[str]) -> list[str]:
        assert (mine, others) == ("GPU-u1", ["GPU-u0", "GPU-u2", "GPU-u3"])
        if isinstance(unlinked, OSError):
            raise unlinked
        return list(unlinked)

    monkeypatch.setattr(gpu_checks, "without_nvlink", answer)
    with caplog.at_level(logging.WARNING):
        gpu_checks.warn_without_nvlink(GPU)
    assert (warning in caplog.text) if warning else (caplog.text == "")


def place(max_tokens: int) -> exchange.Place:
    return exchange.Place(1, 4, 256, Path("/nowhere"), 1.0, GPU, 7168, 8, max_tokens, scale_columns=1)


def test_nccl_refuses_steps_that_do_not_fit_before_it_joins(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_checks, "warn_without_nvlink", lambda device: None)
    with pytest.raises(StartError, match="exchange nccl with 65536 tokens a rank needs"):
        exchange.create("nccl", place(65536))


def test_the_memory_of_an_nccl_step_covers_its_largest_tensors() -> None:
    gathered = 4 * 1024 * (7168 + 4 + 64)
    rows = 4 * 1024 * 8 * (7168 + 4 + 4)
    contributions = 4096 * 8 * 7168 * 2
    sums = 2 * 4 * 1024 * 7168 * 2
    assert gathered + rows + contributions + sums < nccl.step_bytes(place(1024)) < 2 << 30
