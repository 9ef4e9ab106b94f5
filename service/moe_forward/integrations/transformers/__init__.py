"""Models of `transformers` whose MoE blocks a service computes; attention, norms and the cache stay where they are.

    with attach(model, "http://127.0.0.1:8000"):
        model.generate(**inputs)

Two ways to route. `gate="server"` (default) sends hidden states and nothing else: the layer's gate at the service
chooses, in float32 by the router of the served checkpoint, as for every other client, and the model needs no weights
of its MoE blocks (they may lie on the meta device). `gate="local"` runs the model's own gate and sends its choice: for
routers that were changed, and for `output_router_logits`. Shared experts are the service's in both.

`state_dict` and `save_pretrained` of an attached model lack what the service computes: detach first. The service
has no backward, and a call of it ends a compiled graph.

`record_calibration` writes what `moe-forward quantize --calibration` reads, while a model runs.
"""

from __future__ import annotations

from moe_forward.integrations.transformers.attach import Attached, attach
from moe_forward.integrations.transformers.calibration import record_calibration

__all__ = ["Attached", "attach", "record_calibration"]
