"""Models of `transformers`, quantized and served: the same experts, and only quantization in between."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from moe_forward import gates
from w4afp8 import portable

from .forwards import Forward, as_safetensors, post, read_output
from .in_process import InProcess
from .local import Local, relative_error
from .running import Service, command

transformers = pytest.importorskip("transformers")

# warnings of transformers about itself are not about this package
pytestmark = [pytest.mark.service, pytest.mark.filterwarnings("ignore")]

TOKENS = 96
MAX_LAYER_ERROR = 6e-3
MAX_DIFFERENCE = 1e-2
TIE = 1e-6
"""Scores this near may be ranked either way by another order of additions."""

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
CONFIGS = {
    "DeepseekV3": COMMON
    | {
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    },
    "Qwen3Moe": COMMON | {"num_experts": 16, "head_dim": 64},
    "Mixtral": COMMON | {"num_local_experts": 16, "intermediate_size": 128},
}


@dataclass(frozen=True)
class Served:
    """A served model beside transformers' own block of its last layer.

    block_output: [T, H] float32. ids, weights: [T, K] as transformers' block chose them.
    """

    service: Service | InProcess
    local: Local
    forward: Forward
    block_output: Tensor
    ids: Tensor
    weights: Tensor


@pytest.fixture(scope="module", params=list(CONFIGS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, start: Any) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    model.save_pretrained(folder / "source")
    done = subprocess.run(
        command("quantize", str(folder / "source"), str(folder / request.param), "--workers", "2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hidden = torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(5))
    block = model.model.layers[1].mlp
    chosen: list[Tensor] = []
    block.experts.register_forward_pre_hook(lambda module, inputs: chosen.extend(inputs[1:3]))
    with torch.no_grad():
        output = block(hidden.unsqueeze(0))
    output = (output[0] if isinstance(output, tuple) else output).view(TOKENS, 256)
    with serve(request.param, folder / request.param, start) as service:
        yield Served(service, Local(folder / request.param), Forward(1, hidden), output, chosen[0], chosen[1])


@contextmanager
def serve(family: str, folder: Path, start: Any) -> Iterator[Service | InProcess]:
    """Serve DeepSeek's experts with every process they have, the others' without the ten seconds that Ray takes."""
    if family == "DeepseekV3":
        with start(folder) as service:
            yield service
    else:
        with closing(InProcess(folder, {"slab_bytes": 64 << 20, "max_body_bytes": 16 << 20})) as service:
            service.wait_ready()
            yield service


def make_model(family: str) -> Any:
    """Make a float32 model with random weights, router bias included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for layer in model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            torch.nn.init.normal_(gate.weight, std=0.08)
            if hasattr(gate, "e_score_correction_bias"):
                torch.nn.init.normal_(gate.e_score_correction_bias, std=0.05)
    return model


def test_the_service_chooses_the_experts_that_transformers_chooses(served: Served) -> None:
    spec, layer = served.local.spec, served.local.layers[1]
    logits = portable.linear(served.forward.hidden, layer.gate_weight)
    ids, weights = gates.choose(spec.gate, spec.top_k, logits, layer.gate_bias)
    same = (ids.sort(1).values == served.ids.sort(1).values).all(1)
    # A score moved by TIE in either direction must not change the choice where it is said to be clear.
    clear = torch.ones(TOKENS, dtype=torch.bool)
    for sign in (-1.0, 1.0):
        moved = logits + sign * TIE * torch.linspace(-1, 1, spec.num_experts)
        clear &= (
            gates.choose(spec.gate, spec.top_k, moved, layer.gate_bias)[0].sort(1).values == ids.sort(1).values
        ).all(1)
    print(f"{spec.name}: {int(same.sum())} of {TOKENS} tokens with the same experts, {int((~clear).sum())} near a tie")
    assert int(clear.sum()) > TOKENS * 0.9
    assert bool(same[clear].all())
    order, theirs = ids.argsort(1), served.ids.argsort(1)
    torch.testing.assert_close(weights.gather(1, order)[same], served.weights.gather(1, theirs)[same])


def test_own_gate_and_the_choice_of_transformers_give_the_same_output(served: Served) -> None:
    chosen = Forward(1, served.forward.hidden, ids=served.ids, weights=served.weights.float().contiguous())
    own = read_output(post(served.service.url, as_safetensors(served.forward)))
    theirs = read_output(post(served.service.url, as_safetensors(chosen)))
    per_token = (own - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert float(per_token.max()) < 1e-4


def test_router_logits_of_transformers_give_the_same_output(served: Served) -> None:
    logits = served.forward.hidden @ served.local.layers[1].gate_weight.T
    own = read_output(post(served.service.url, as_safetensors(served.forward)))
    theirs = read_output(post(served.service.url, as_safetensors(Forward(1, served.forward.hidden, logits=logits))))
    assert relative_error(theirs, own) < 1e-4


def test_only_quantization_lies_between_transformers_and_the_service(served: Served) -> None:
    output = read_output(post(served.service.url, as_safetensors(served.forward)))
    exact = served.local.exact(served.forward)
    of_service = relative_error(output, served.block_output)
    of_exact = relative_error(exact, served.block_output)
    against_exact = relative_error(output, exact)
    print(
        f"{served.local.spec.name}: relative error against transformers' float32 block: service {of_service:.4f}, "
        f"float64 with the same quantized weights {of_exact:.4f}; service against float64 {against_exact:.2e}"
    )
    assert against_exact <= MAX_LAYER_ERROR
    assert abs(of_service - of_exact) <= MAX_DIFFERENCE
    assert 0.01 < of_exact < 0.3


def test_the_served_layers_are_those_with_experts(served: Served) -> None:
    layers = httpx.get(f"{served.service.url}/v1/placement").json()["layers"]
    assert layers == ([1] if served.local.spec.gate.kind == "deepseek_v3" else [0, 1])
