"""What the deepep exchange decides before DeepEP does anything; its steps are in test_exchange_gpu."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moe_forward import exchange
from moe_forward.errors import StartError
from moe_forward.exchange import deepep, gpu_checks


def place(hidden_size: int = 7168, num_experts: int = 256, top_k: int = 8) -> exchange.Place:
    gpu = torch.device("cuda", 0)
    return exchange.Place(0, 2, num_experts, Path("/nowhere"), 1.0, gpu, hidden_size, top_k, 128, scale_columns=1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hidden_size": 7040}, "hidden size in multiples of 256, got 7040; use exchange nccl"),
        ({"top_k": 33}, "at most 32 experts a token, got 33"),
        ({"num_experts": 514}, "at most 256 experts a rank, got 257"),
    ],
)
def test_a_model_that_deepep_cannot_carry_is_refused_before_anything_starts(
    shape: dict[str, int], message: str
) -> None:
    with pytest.raises(StartError, match=message):
        exchange.create("deepep", place(**shape))


def test_a_deepep_that_does_not_import_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("__init__.py", "buffers/elastic.py"):
        (tmp_path / "deep_ep" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "deep_ep" / file).write_text("raise AssertionError('Invalid NCCL versions')\n")
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    for check in ("use_device", "check_peers", "warn_without_nvlink", "check_nccl_version"):
        monkeypatch.setattr(gpu_checks, check, lambda *_: "")
    for check in ("check_compiler", "disable_gin_without_nic"):
        monkeypatch.setattr(gpu_checks, check, lambda: None)
    with pytest.raises(StartError, match="importing deep_ep failed: Invalid NCCL versions; or use exchange nccl"):
        exchange.create("deepep", place())


def test_numbers_of_tokens_share_few_sizes_since_each_is_compiled() -> None:
    sizes = {deepep.padded_size(tokens, 4096) for tokens in range(4097)}
    assert sizes == {128, 512, 2048, 4096}
    assert [deepep.padded_size(tokens, 4096) for tokens in (0, 1, 128, 129, 512, 513)] == [
        128,
        128,
        128,
        512,
        512,
        2048,
    ]


def test_no_size_is_larger_than_the_buffer() -> None:
    assert [deepep.padded_size(tokens, 100) for tokens in (1, 100)] == [100, 100]
    with pytest.raises(ValueError, match="at most 100 tokens a rank, got 101"):
        deepep.padded_size(101, 100)


def test_experts_are_seated_as_deepep_counts_them() -> None:
    """expert_range gives 2 ranks of 5 experts 2 and 3 of them; DeepEP thinks of 3 and 3."""
    assert deepep.seats(5, 2).tolist() == [0, 1, 3, 4, 5, -1]
    assert deepep.seats(8, 2).tolist() == [*range(8), -1]
    assert deepep.seats(2, 4).tolist() == [1, 3, -1]
