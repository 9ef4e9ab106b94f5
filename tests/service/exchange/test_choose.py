"""Which exchange `auto` means, and what is said where a named one cannot work."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from moe_forward import exchange
from moe_forward.errors import StartError
from moe_forward.exchange.deepep_package import missing_deepep


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Put a package deep_ep with the given files before everything else."""
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    for module in ("__init__.py", *modules):
        path = folder / "deep_ep" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(folder))


def test_auto_takes_local_for_one_rank_and_gloo_on_cpu() -> None:
    assert exchange.choose("auto", 1, "cpu") == "local"
    assert exchange.choose("auto", 1, "cuda") == "local"
    assert exchange.choose("auto", 2, "cpu") == "gloo"
    assert exchange.choose("gloo", 1, "cpu") == "gloo"


def test_auto_on_gpus_takes_deepep_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch, "buffers/elastic.py")
    with caplog.at_level(logging.INFO, "moe_forward.exchange"):
        assert exchange.choose("auto", 2, "cuda") == "deepep"
    assert "DeepEP V2 is installed" in caplog.text
    assert exchange.choose("nccl", 2, "cuda") == "nccl"


def test_auto_on_gpus_takes_nccl_without_deepep_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING, "moe_forward.exchange"):
        assert exchange.choose("auto", 2, "cuda") == "nccl"
    assert "has no ElasticBuffer; build it from github.com/deepseek-ai/DeepEP" in caplog.text


def test_the_placeholder_of_the_index_is_not_deepep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert str(tmp_path) in missing_deepep()
    with pytest.raises(StartError, match="not DeepEP V2, it has no ElasticBuffer"):
        exchange.choose("deepep", 2, "cuda")


@pytest.mark.parametrize(
    ("name", "ranks", "device", "message"),
    [
        ("rdma", 2, "cuda", "exchange rdma is not part of this version; it has deepep, gloo, local, nccl"),
        ("local", 2, "cpu", "exchange local serves one rank, not 2; use gloo"),
        ("local", 2, "cuda", "exchange local serves one rank, not 2; use auto"),
        ("gloo", 2, "cuda", "exchange gloo serves CPU ranks, not cuda; use deepep or nccl"),
        ("nccl", 2, "cpu", "exchange nccl serves GPU ranks, not cpu; use gloo"),
        ("deepep", 2, "cpu", "exchange deepep serves GPU ranks, not cpu; use gloo"),
    ],
)
def test_an_exchange_that_cannot_serve_is_refused_by_name(name: str, ranks: int, device: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        exchange.choose(name, ranks, device)


def test_deepep_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match=r"deep_ep is not installed; build it .* or use exchange nccl"):
        exchange.choose("deepep", 2, "cuda")
