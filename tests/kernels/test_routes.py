"""What routes must be before a kernel reads them."""

from __future__ import annotations

import pytest
import torch

from w4afp8.routes import pad_routes_cuda


def test_routes_must_be_on_a_gpu() -> None:
    ids, weights = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="out_ids: expected a CUDA tensor"):
        pad_routes_cuda(ids, weights, ids, weights)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ids", {"ids": torch.zeros(2, 3)}),
        ("ids", {"ids": torch.zeros(6, dtype=torch.int64)}),
        ("weights", {"weights": torch.zeros(2, 4)}),
        ("weights", {"weights": torch.zeros(2, 3, dtype=torch.float64)}),
        ("out_ids", {"out_ids": torch.zeros(1, 3, dtype=torch.int64)}),
        ("out_ids", {"out_ids": torch.zeros(2, 3, dtype=torch.int32)}),
        ("out_weights", {"out_weights": torch.zeros(3, 3)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, given: dict[str, torch.Tensor]) -> None:
    arguments = {
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        "weights": torch.zeros(2, 3),
        "out_ids": torch.zeros(2, 3, dtype=torch.int64),
        "out_weights": torch.zeros(2, 3),
    } | given
    with pytest.raises(ValueError, match=rf"^{name}: "):
        pad_routes_cuda(**{key: tensor.cuda() for key, tensor in arguments.items()})
