"""Where tensor calls are made."""

from __future__ import annotations

FORWARD = "/v1/moe/forward"
_MODELS = "/v2/models/"
_INFER = "/infer"


def is_tensor_path(path: str) -> bool:
    """Whether a call of this path brings tensors."""
    return path == FORWARD or inference_target(path) is not None


def inference_target(path: str) -> tuple[str, str | None] | None:
    """Return model and version of an inference call of the Open Inference Protocol, or None for any other path."""
    if not (path.startswith(_MODELS) and path.endswith(_INFER)):
        return None
    parts = path[len(_MODELS) : -len(_INFER)].split("/")
    if not all(parts):
        return None
    if len(parts) == 1:
        return parts[0], None
    return (parts[0], parts[2]) if len(parts) == 3 and parts[1] == "versions" else None
