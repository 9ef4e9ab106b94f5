"""The services that these tests share: a tiny model on two ranks for most of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_forward import checkpoint

from .forwards import Forward
from .local import Local
from .running import Service

ADMIN_TOKEN = "a secret of these tests"
SLAB_BYTES = 192 << 20
CONFIG: dict[str, Any] = {
    "slab_bytes": SLAB_BYTES,
    "max_body_bytes": SLAB_BYTES,
    "max_wait_us": 20_000,  # long enough for requests sent together to meet in one step
    "default_timeout_seconds": 120.0,
    "expert_metrics": True,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `synthetic:tiny`: layers 1 to 3, H 256, 32 experts, top 4, a shared expert."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.make_model("tiny", folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def local(tiny: Path) -> Local:
    """The same model in this process."""
    return Local(tiny)


@pytest.fixture(scope="session")
def service(tiny: Path) -> Iterator[Service]:
    """The tiny model on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "admin_token"
        token.write_text(ADMIN_TOKEN)
        running = Service(tiny, 2, {**CONFIG, "admin_token_file": str(token)})
        try:
            yield running.wait_ready()
            assert running.process.poll() is None, f"the service died:\n{running.log}"
        finally:
            running.close()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """Start another service of a checkpoint: (folder, ranks=2, **configuration) -> context manager."""
    from contextlib import contextmanager

    @contextmanager
    def run(folder: Path, ranks: int = 2, **config: Any) -> Iterator[Service]:
        running = Service(folder, ranks, {**CONFIG, **config})
        try:
            yield running.wait_ready()
        finally:
            running.close()

    return run


@pytest.fixture(scope="session")
def random_forward() -> Callable[..., Forward]:
    """Make a forward of random tokens: (seed, tokens, layer=1, dtype=bfloat16, **fields)."""

    def make(seed: int, tokens: int, layer: int = 1, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Forward:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 256, generator=generator).to(dtype)
        return Forward(layer, hidden, **fields)

    return make
