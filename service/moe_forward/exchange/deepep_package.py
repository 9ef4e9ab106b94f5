"""Whether DeepEP V2 is installed, found out without importing it: the import needs a GPU and its NCCL."""

from __future__ import annotations

import importlib.util
from pathlib import Path

INSTALL = (
    "build it from github.com/deepseek-ai/DeepEP (2.1 or newer) with NCCL 2.30.4 or newer, below 2.31; "
    "the index's package deep-ep is a placeholder"
)


def missing_deepep() -> str:
    """Say why `deep_ep` cannot be used, or nothing where it can.

    Returns: empty, or a clause that says what was looked for and what to install.
    """
    spec = importlib.util.find_spec("deep_ep")
    if spec is None:
        return f"the package deep_ep is not installed; {INSTALL}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "buffers" / "elastic.py").is_file() for folder in folders):
        return f"the package deep_ep at {spec.origin} is not DeepEP V2, it has no ElasticBuffer; {INSTALL}"
    return ""
