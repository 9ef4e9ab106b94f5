"""Choosing and making a backend by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_forward.errors import StartError
from moe_forward.experts import EXPERTS, check, choose, create
from moe_forward.experts.reference import ReferenceExperts

CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Make this process believe in a GPU that fits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "fine GPU")
    return monkeypatch


def test_auto_takes_what_computes_best_on_the_device() -> None:
    assert choose("auto", "cpu") == "reference"
    assert choose("auto", "cuda") == "cutlass"


def test_every_backend_of_the_table_is_chosen_by_its_name() -> None:
    assert [choose(name, "cuda") for name in EXPERTS] == list(EXPERTS)


def test_cutlass_on_a_cpu_is_refused_and_not_replaced() -> None:
    with pytest.raises(StartError, match="experts cutlass: computes on GPUs, and the device is cpu"):
        choose("cutlass", "cpu")
    with pytest.raises(StartError, match="experts cutlass: needs a GPU, the device is cpu"):
        check("cutlass", torch.device("cpu"))


def test_reference_is_the_portable_backend_and_needs_nothing() -> None:
    check("reference", torch.device("cpu"))
    assert isinstance(create("reference", {}, "token"), ReferenceExperts)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    message = "experts triton is not part of this version; it has cutlass, reference"
    with pytest.raises(StartError, match=message):
        choose("triton", "cpu")
    with pytest.raises(StartError, match=message):
        create("triton", {}, "token")


def test_cutlass_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StartError, match="experts cutlass: no CUDA GPU is visible"):
        create("cutlass", {}, "token")


def test_cutlass_on_another_gpu_names_it(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        StartError, match=r"compute capability 9\.0 .*cuda:0 is a fine GPU of 8\.0; set experts: reference"
    ):
        check("cutlass", CUDA)


def test_cutlass_without_its_library_names_the_build_command(hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hopper.setenv("W4AFP8_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(StartError, match=r"experts cutlass: kernel library: .*none\.so.*`python -m w4afp8\.build`"):
        check("cutlass", CUDA)


def test_cutlass_with_a_library_that_does_not_load_names_the_build_command(
    hopper: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.so").write_text("no library")
    hopper.setenv("W4AFP8_LIBRARY", str(tmp_path / "broken.so"))
    with pytest.raises(StartError, match=r"broken\.so.*`python -m w4afp8\.build`"):
        check("cutlass", CUDA)
