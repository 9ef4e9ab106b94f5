"""The router of a rank: in torch on a CPU, by kernels with the same bits on a GPU."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

from moe_forward import gates, router
from moe_forward.checkpoint import LayerWeights
from moe_forward.router import Router, Routes
from moe_forward.types import GateSpec, ModelSpec

LAYERS = (3, 7)
H, E, K = 128, 32, 4
GROUPED = GateSpec("deepseek_v3", 4, 2, True, 2.5)
GATES = [GROUPED, GateSpec("softmax")]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def make_router(gate: GateSpec, device: torch.device, experts: int = E) -> Router:
    generator = torch.Generator().manual_seed(0)

    def layer() -> LayerWeights:
        bias = torch.randn(experts, generator=generator) * 0.1 if gate.kind == "deepseek_v3" else None
        return LayerWeights((), None, torch.randn(experts, H, generator=generator) * 0.1, bias)

    spec = ModelSpec("routed", H, 128, experts, K, 0, LAYERS, 128, gate)
    return Router(spec, {number: layer() for number in LAYERS}, device)


def rows(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count))


def same(left: Routes, right: Routes) -> bool:
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_float_type_is_routed_as_the_float32_it_stands_for(dtype: torch.dtype, gate: GateSpec) -> None:
    made = make_router(gate, CPU)
    made.warm_up()
    hidden, logits = rows(5, H).to(dtype), rows(5, E).to(dtype)
    assert same(made.by_hidden(3, hidden), made.by_hidden(3, hidden.float()))
    assert same(made.by_logits(3, logits), made.by_logits(3, logits.float()))
    assert not same(made.by_hidden(3, hidden), made.by_hidden(7, hidden)), "layers have routers of their own"


def test_rows_with_logits_that_are_not_finite_are_flagged_and_alone() -> None:
    made = make_router(GROUPED, CPU)
    logits = rows(4, E)
    clean = made.by_logits(3, logits)
    logits[2, 5] = torch.nan
    routes = made.by_logits(3, logits)
    assert routes.non_finite.tolist() == [False, False, True, False]
    assert bool(((routes.ids >= 0) & (routes.ids < E)).all())
    for row in (0, 1, 3):
        assert torch.equal(routes.ids[row], clean.ids[row])
        assert torch.equal(routes.weights[row], clean.weights[row])


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 65, 300])
def test_a_gpu_routes_with_the_bits_of_a_cpu(count: int, dtype: torch.dtype, gate: GateSpec) -> None:
    on_cpu, on_gpu = make_router(gate, CPU), make_router(gate, torch.device("cuda"))
    on_gpu.warm_up()
    hidden, logits = rows(count, H).to(dtype), rows(count, E).to(dtype)
    hidden[0, 0] = torch.nan
    good = torch.arange(count) > 0
    for layer in LAYERS:
        assert same(on_gpu.by_logits(layer, logits.cuda()), on_cpu.by_logits(layer, logits))
        found, expected = on_gpu.by_hidden(layer, hidden.cuda()), on_cpu.by_hidden(layer, hidden)
        assert torch.equal(found.non_finite.cpu(), ~good)
        assert same(Routes(*(part.cpu()[good] for part in found)), Routes(*(part[good] for part in expected)))


def refuse(*_: Any) -> Any:
    raise AssertionError("the kernel was called")


@pytest.mark.gpu
@pytest.mark.parametrize("missing", ["kernel", "room"])
def test_a_gate_that_the_kernel_does_not_know_or_cannot_hold_is_computed_in_torch(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "kernel":
        monkeypatch.setattr(gates, "KERNELS", MappingProxyType({"deepseek_v3": None}))
    monkeypatch.setattr(router, "route_cuda", refuse)
    monkeypatch.setattr(router, "choose_experts_cuda", refuse)
    experts = E if missing == "kernel" else 1040
    on_cpu, on_gpu = (make_router(GROUPED, torch.device(name), experts) for name in ("cpu", "cuda"))
    on_gpu.warm_up()
    assert same(on_gpu.by_hidden(3, rows(5, H).cuda()), on_cpu.by_hidden(3, rows(5, H)))
    assert same(on_gpu.by_logits(3, rows(5, experts).cuda()), on_cpu.by_logits(3, rows(5, experts)))
