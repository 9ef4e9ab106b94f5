"""Routes are widened and padded as torch would do it."""

from __future__ import annotations

import pytest
import torch

from w4afp8.routes import pad_routes_cuda

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (0, 4), (3, 8), (32, 32), (300, 512), (2047, 2048)])
@pytest.mark.parametrize("top_k", [1, 6, 8, 22])
def test_rows_have_their_routes_and_padding_has_none(dtype: torch.dtype, rows: int, padded: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(rows + top_k)
    ids = torch.randint(-1, 256, (rows, top_k), dtype=dtype, generator=generator).cuda()
    weights = torch.rand(rows, top_k, generator=generator).cuda()
    out_ids = torch.full((padded + 2, top_k), 77, dtype=torch.int64).cuda()
    out_weights = torch.full((padded + 2, top_k), 0.5).cuda()
    pad_routes_cuda(ids, weights, out_ids[:padded], out_weights[:padded])
    assert torch.equal(out_ids[:rows], ids.long())
    assert bool((out_ids[rows:padded] == -1).all())
    assert bool((out_ids[padded:] == 77).all())
    assert torch.equal(out_weights[:rows], weights)
    assert bool((out_weights[rows:] == 0.5).all())
