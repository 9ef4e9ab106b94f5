"""Where matrices are quantized: what goes through a device, which one is chosen, and that a GPU changes no byte."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward.checkpoint import device, quantize
from moe_forward.checkpoint.device import Cpu, choose_device
from moe_forward.errors import CheckpointError

from .test_calibration import write_calibration


class FakeGpu:
    """A GPU of CPU memory that refuses work outside its lane."""

    name, strip_elements, max_workers = "fake:0", 128 * 128, 3

    def __init__(self) -> None:
        self.lanes = threading.local()
        self.uploaded: list[tuple[int, ...]] = []
        self.downloaded = 0

    def lane(self) -> AbstractContextManager[object]:
        return self._lane()

    @contextmanager
    def _lane(self) -> Iterator[None]:
        self.lanes.open = True
        yield
        self.lanes.open = False

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.lanes.open
        self.uploaded.append(tuple(tensor.shape))
        return tensor.clone()

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.lanes.open
        self.downloaded += 1
        return tensor.clone()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scales", ["rtn", "search"])
def test_strips_go_up_and_results_come_down_in_a_lane(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scales: Any
) -> None:
    gpu = FakeGpu()
    quantize(source, tmp_path / "cpu", progress=False, scales=scales, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(device, "Gpu", lambda: gpu)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        quantize(source, tmp_path / "gpu", progress=False, scales=scales, device="auto")
    assert files(tmp_path / "cpu") == files(tmp_path / "gpu")
    assert {(128, 256), (128, 128)} <= set(gpu.uploaded)  # down [256, 128] in two strips
    assert gpu.downloaded >= 2 * 18


def test_auto_takes_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(choose_device("auto"), Cpu)
    with pytest.raises(CheckpointError, match="expected a CUDA GPU for cuda, but torch finds none"):
        choose_device("cuda")
    with pytest.raises(CheckpointError, match="device: expected one of auto, cpu, cuda, got 'tpu'"):
        choose_device("tpu")  # type: ignore[arg-type]


def test_the_device_is_asked_for_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match="torch finds none"):
        quantize(source, tmp_path / "out", progress=False, device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rtn", "search", "calibrated"])
def test_a_gpu_writes_the_bytes_that_the_cpu_writes(source: Path, tmp_path: Path, kind: str) -> None:
    write_calibration(tmp_path / "calibration", (1,), experts=4)
    options: dict[str, Any] = {"scales": "rtn" if kind == "rtn" else "search", "progress": False}
    if kind == "calibrated":
        options["calibration"] = tmp_path / "calibration"
    for name in ("cpu", "cuda"):
        quantize(source, tmp_path / name, device=name, **options)  # type: ignore[arg-type]
    assert files(tmp_path / "cpu") == files(tmp_path / "cuda")
