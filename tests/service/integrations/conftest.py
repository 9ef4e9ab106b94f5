"""A service for each family of models, one of them as an operator starts it, and its experts in this process too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward import checkpoint

from ..whole.in_process import InProcess
from ..whole.local import Local
from ..whole.running import Service

CONFIG: dict[str, Any] = {
    "slab_bytes": 64 << 20,
    "max_body_bytes": 16 << 20,
    "max_request_tokens": 64,
    "rank_threads": 1,  # three services and a model share the cores
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch from waiting for threads that the services keep off the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Served:
    """A model, the service of its quantized experts, and those experts in this process."""

    model: Any
    service: Service | InProcess
    local: Local


@pytest.fixture(scope="session")
def services() -> Iterator[dict[str, Served]]:
    """Every family: name in transformers -> what is served of it."""
    from .tiny_models import CONFIGS, make_model

    started: list[Service | InProcess] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as closing:
        closing.callback(lambda: [service.close() for service in started])
        running = {}
        for family in CONFIGS:
            folder, model = Path(name) / family, make_model(family)
            model.save_pretrained(folder / "source")
            checkpoint.quantize(folder / "source", folder / "served", workers=1, progress=False)
            started.append(serve(family, folder / "served"))
            running[family] = Served(model, started[-1], Local(folder / "served"))
        for service in started:
            service.wait_ready()
        yield running


def serve(family: str, folder: Path) -> Service | InProcess:
    """Serve DeepSeek's experts with every process they have, the others' without the ten seconds that Ray takes."""
    return Service(folder, 1, CONFIG) if family == "DeepseekV3" else InProcess(folder, CONFIG)
