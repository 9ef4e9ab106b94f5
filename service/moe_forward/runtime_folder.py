"""A folder of the service's own, mode 0700: the engine's socket, the rank groups' meeting files, the Ray token."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_forward.errors import StartError

log = logging.getLogger(__name__)

_PREFIX = "moe-forward-"
_LOCK = "lock"
"""Locked while the service lives, however it ends."""

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

    Folders of services that were killed are removed too: nobody else would, and they hold a token.

    joins_ray: Ray runs already, and what its hosts were told about tokens holds here. Else Ray is started in this
        process: it gets a token of its own and stays on loopback.
    allow_ray_without_token: that Ray asks for no token.
    Raises: StartError when Ray was imported before, since it reads its environment while it is imported.
    """
    if "ray" in sys.modules:
        raise StartError("Ray was imported before its token was made: it would run without one")
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = _lock(folder)
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
        lock.close()


def _lock(folder: Path) -> BinaryIO:
    """Make a folder's lock; it has its name only once it is held, so that nobody finds it free before."""
    unnamed = folder / f"{_LOCK}.new"
    file = unnamed.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    unnamed.rename(folder / _LOCK)
    return file


def _remove_abandoned(parent: Path) -> None:
    """Remove this user's folders whose service is gone without having removed them."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, being made or removed, or held by a living service
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.info("removed %s of a service that was killed", folder)
