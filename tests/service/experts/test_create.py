"""Choosing a backend by name."""

from __future__ import annotations

import pytest

from moe_forward.errors import StartError
from moe_forward.experts import EXPERTS, choose, create
from moe_forward.experts.reference import ReferenceExperts


def test_auto_takes_reference_on_cpu() -> None:
    assert choose("auto", "cpu") == "reference"


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda"), ("cutlass", "cuda"), ("cutlass", "cpu")])
def test_cutlass_is_refused_and_not_replaced(name: str, device: str) -> None:
    with pytest.raises(StartError, match="do not use the sm_90a kernel library of w4afp8 yet; they have reference"):
        choose(name, device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_backend_of_the_table_is_chosen_by_its_name(device: str) -> None:
    assert [choose(name, device) for name in EXPERTS] == list(EXPERTS)


def test_reference_is_the_portable_backend() -> None:
    assert isinstance(create("reference", {}, "token"), ReferenceExperts)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StartError, match="experts triton is not part of this version; it has reference"):
        choose("triton", "cpu")
    with pytest.raises(StartError, match="experts triton is not part of this version; it has reference"):
        create("triton", {}, "token")


def test_making_cutlass_is_refused_too() -> None:
    with pytest.raises(StartError, match="sm_90a kernel library"):
        create("cutlass", {}, "token")
