"""Skips what this machine cannot run, with the reason."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `multigpu` where there are too few CUDA GPUs."""
    wanted = [
        (item, 2 if "multigpu" in item.keywords else 1) for item in items if {"gpu", "multigpu"} & {*item.keywords}
    ]
    if not wanted:
        return
    import torch  # only here: importing torch takes seconds, and most selections need no GPU

    found = torch.cuda.device_count()
    for item, needed in wanted:
        if found < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {found}"))
