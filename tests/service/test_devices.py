"""The device that ranks compute on: what was asked for where it works, and why not where it does not."""

from __future__ import annotations

import logging

import pytest
import torch

from moe_forward import devices
from moe_forward.errors import ConfigError, StartError
from w4afp8.library import LibraryNotBuilt


class Host:
    """A host with GPUs as torch would describe it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda: str | None = "13.0"
        self.capabilities = [(9, 0), (9, 0)]
        self.library: Exception | None = None
        monkeypatch.setattr(torch.version, "cuda", self.cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: self.capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Model {index}")
        monkeypatch.setattr(devices, "load", self._load)

    def _load(self) -> None:
        if self.library is not None:
            raise self.library


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_auto_takes_gpus_that_fit_and_says_so(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert devices.choose("auto", kernels=True) == "cuda"
    assert "device cuda: 2 GPUs of compute capability 9.0" in caplog.text
    assert devices.choose("cuda", kernels=True) == "cuda"


def test_cpu_is_not_questioned(host: Host) -> None:
    assert devices.choose("cpu", kernels=True) == "cpu"


def test_without_gpus_auto_serves_on_cpu_and_cuda_is_refused(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.capabilities = []
    caplog.set_level(logging.INFO)
    assert devices.choose("auto", kernels=True) == "cpu"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "no GPU is visible" in caplog.text
    with pytest.raises(StartError, match="device cuda: no GPU is visible"):
        devices.choose("cuda", kernels=True)


def test_a_gpu_of_another_generation_is_named(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.capabilities = [(9, 0), (8, 6)]
    with pytest.raises(StartError, match=r"GPU 1 \(Model 1\) has compute capability 8.6, the kernels need 9.0"):
        devices.choose("cuda", kernels=True)
    assert devices.choose("auto", kernels=True) == "cpu"
    assert [record.levelname for record in caplog.records] == ["WARNING"], "GPUs that stay idle are worth a warning"
    assert devices.choose("cuda", kernels=False) == "cuda"


def test_a_missing_library_is_said_with_the_command_that_builds_it(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.library = LibraryNotBuilt("build it with `python -m w4afp8.build`")
    with pytest.raises(StartError, match=r"device cuda: build it with `python -m w4afp8\.build`"):
        devices.choose("cuda", kernels=True)
    assert devices.choose("auto", kernels=True) == "cpu"
    assert "w4afp8.build" in caplog.text


def test_torch_without_cuda_is_said(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(StartError, match="was built without CUDA"):
        devices.choose("cuda", kernels=True)


@pytest.mark.parametrize(
    ("name", "visible", "index"),
    [("2", None, 2), ("0", None, 0), ("5", "4,5", 1), ("4", "4", 0), ("GPU-b", "GPU-a,GPU-b", 1)],
)
def test_a_gpu_of_ray_is_found_among_the_visible_ones(name: str, visible: str | None, index: int) -> None:
    assert devices.cuda_index(name, visible) == index


def test_there_is_a_rank_for_every_gpu_and_none_without(host: Host) -> None:
    assert devices.choose_ranks(None, "cuda") == 2
    assert devices.choose_ranks(1, "cuda") == 1
    with pytest.raises(ConfigError, match="ranks: 3 ranks need a GPU each, 2 are visible"):
        devices.choose_ranks(3, "cuda")
    assert devices.choose_ranks(None, "cpu") == 2
    assert devices.choose_ranks(5, "cpu") == 5
