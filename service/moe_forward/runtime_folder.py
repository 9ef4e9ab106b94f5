"""A folder of the service's own, mode 0700: the engine's socket, the rank groups' meeting files, the Ray token."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_forward.errors import StartError

_RAY = {
    "RAY_AUTH_MODE": "token",
    # Ray's name for a local cluster where it may not listen beyond loopback: without it every Ray process listens on
    # all interfaces, and ray.init's node address of 127.0.0.1 is replaced by the host's.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's processes live as long as this one; should one die, do not look for it long.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


@contextmanager
def runtime_folder(joins_ray: bool = False, allow_ray_without_token: bool = False) -> Iterator[Path]:
    """Make the folder, remove it in the end, and set how this process uses Ray.

    joins_ray: Ray runs already, and what its hosts were told about tokens holds here. Else Ray is started in this
        process: it gets a token of its own and stays on loopback.
    allow_ray_without_token: that Ray asks for no token.
    Raises: StartError when Ray was imported before, since it reads its environment while it is imported.
    """
    if "ray" in sys.modules:
        raise StartError("Ray was imported before its token was made: it would run without one")
    folder = Path(tempfile.mkdtemp(prefix="moe-forward-"))
    try:
        if joins_ray:
            # The mode must be the cluster's: a process that asks for tokens is given up by a Ray that has none.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled" if allow_ray_without_token else "token")
        else:
            token = folder / "ray_token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the path
            os.environ |= {**_RAY, "RAY_AUTH_TOKEN_PATH": str(token)}
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
