"""From what an operator names as the model to a folder: a checkpoint, or a synthetic model made on first use."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from moe_forward.checkpoint.layout import CONFIG_FILE
from moe_forward.checkpoint.presets import PRESETS
from moe_forward.checkpoint.synthetic import make_model
from moe_forward.errors import CheckpointError

SYNTHETIC_PREFIX = "synthetic:"
SYNTHETIC_VERSION = "1"
"""Changes whenever the bytes of a preset change, so that an older cache is not taken for it."""


def resolve_model(model: str, cache_folder: Path | None = None) -> Path:
    """Find the folder of a model.

    model: a folder, or synthetic:NAME for a preset, which is made once and kept.
    cache_folder: where presets are kept; default $XDG_CACHE_HOME or ~/.cache.
    Returns: a folder with a config.json.
    Raises: CheckpointError for a folder without one, or an unknown preset.
    """
    if not model.startswith(SYNTHETIC_PREFIX):
        folder = Path(model).expanduser()
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"model {model!r}: expected a folder with {CONFIG_FILE}, or synthetic:NAME")
        return folder
    preset = model.removeprefix(SYNTHETIC_PREFIX)
    if preset not in PRESETS:
        raise CheckpointError(f"model {model!r}: unknown preset; there are {', '.join(sorted(PRESETS))}")
    folder = (cache_folder or _cache_folder()) / "moe-forward" / SYNTHETIC_VERSION / preset
    if not (folder / CONFIG_FILE).is_file():
        _make_once(preset, folder)
    return folder


def _cache_folder() -> Path:
    # the XDG base directory specification has relative values ignored
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def _make_once(preset: str, folder: Path) -> None:
    """Make a preset beside its place and rename it there: of two processes, the later finds it done and takes it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{preset}.", dir=folder.parent) as scratch:
            made = Path(scratch) / preset
            make_model(preset, made, progress=sys.stderr.isatty())
            try:
                made.rename(folder)
            except OSError:
                if not (folder / CONFIG_FILE).is_file():
                    raise
    except OSError as error:
        raise CheckpointError(f"cannot make the synthetic model in {folder}: {error}") from error
