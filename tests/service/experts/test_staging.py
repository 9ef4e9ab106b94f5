"""Bringing weights to a device, with a CPU in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moe_forward.errors import CheckpointError
from moe_forward.experts import LayerExperts, staging
from moe_forward.experts.staging import TENSORS_AHEAD, Staging, bring_layers
from w4afp8 import ExpertWeights, Fp8BlockWeight, Int4Weight, SharedExpert, quantize_fp8_block, quantize_int4

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE = 256, 128


@pytest.fixture(autouse=True)
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tensor travel in several pieces, the last of them smaller."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(staging, "PIECE_BYTES", 1000)


def make_layer(seed: int, experts: int = 3, shared: bool = True) -> LayerExperts:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))

    def dense() -> list[torch.Tensor]:
        return [torch.randn(*shape, generator=generator) for shape in shapes]

    routed = [ExpertWeights(*(quantize_int4(weight) for weight in dense())) for _ in range(experts)]
    return LayerExperts(routed, SharedExpert(*(quantize_fp8_block(weight) for weight in dense())) if shared else None)


def tensors_of(layer: LayerExperts) -> list[torch.Tensor]:
    parts = [*layer.experts, *([] if layer.shared is None else [layer.shared])]
    return [tensor for expert in parts for weight in expert for tensor in weight]


def assert_same(layer: LayerExperts, other: LayerExperts) -> None:
    assert len(layer.experts) == len(other.experts)
    assert (layer.shared is None) == (other.shared is None)
    for one, same in zip(tensors_of(layer), tensors_of(other), strict=True):
        assert one.dtype == same.dtype
        assert torch.equal(one.view(torch.uint8), same.view(torch.uint8))


def test_layers_arrive_in_order_and_bit_for_bit() -> None:
    layers = {7: make_layer(1), 3: make_layer(2, shared=False), 5: make_layer(3, experts=0)}
    brought = dict(bring_layers(layers, CPU))
    assert list(brought) == [7, 3, 5]
    for number, layer in layers.items():
        assert_same(brought[number], layer)
        assert not {t.data_ptr() for t in tensors_of(layer)} & {t.data_ptr() for t in tensors_of(brought[number])}


def test_weights_mapped_from_a_file_arrive_too(tmp_path: Path) -> None:
    codes, scales = quantize_int4(torch.randn(512, 1024))
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "codes": codes, "scales": scales}, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file, Staging(CPU) as stage:
        mapped = [file.get_tensor(name) for name in ("scales", "codes")]
        brought = list(stage.bring(mapped))
    assert torch.equal(brought[0], scales)
    assert torch.equal(brought[1], codes)


def test_progress_counts_bytes_and_ends_at_the_total() -> None:
    layers = {1: make_layer(1), 2: make_layer(2)}
    total_bytes = sum(tensor.nbytes for layer in layers.values() for tensor in tensors_of(layer))
    calls: list[tuple[int, int]] = []
    for _ in bring_layers(layers, CPU, lambda done, total: calls.append((done, total))):
        pass
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == sum(len(tensors_of(layer)) for layer in layers.values())
    assert calls[-1] == (total_bytes, total_bytes)
    assert {total for _, total in calls} == {total_bytes}


def test_codes_of_groups_without_a_scale_become_zero() -> None:
    layer = make_layer(1)
    up = layer.experts[1].up
    up.scales[5, 1] = 0
    up.codes[5] = -120
    ((_, brought),) = bring_layers({3: layer}, CPU)
    assert brought.experts[1].up.codes[5].tolist() == [-120] * 64 + [0] * 64
    assert torch.equal(brought.experts[1].up.codes[6:], up.codes[6:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_scales_that_are_no_scales_are_refused_by_name(value: float) -> None:
    layer = make_layer(1)
    layer.experts[2].down.scales[3, 0] = value
    with pytest.raises(
        CheckpointError, match="layer 3, expert 2 of this rank, down: scales must be finite and not neg"
    ):
        list(bring_layers({3: layer}, CPU))
    layer = make_layer(1)
    assert layer.shared is not None
    layer.shared.up.scales[0, 1] = value
    with pytest.raises(CheckpointError, match="layer 3, shared expert, up: scales must be finite and not negative"):
        list(bring_layers({3: layer}, CPU))


def test_only_some_tensors_are_on_their_way() -> None:
    asked = 0

    def tensors() -> Iterator[torch.Tensor]:
        nonlocal asked
        for number in range(200):
            asked += 1
            yield torch.full((10,), number)

    with Staging(CPU, readers=2) as stage:
        for taken, tensor in enumerate(stage.bring(tensors()), start=1):
            assert tensor.tolist() == [taken - 1] * 10
            assert asked <= taken + 2 * TENSORS_AHEAD
    assert taken == asked == 200


def test_several_readers_copy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = threading.Barrier(3, timeout=10)
    monkeypatch.setattr(staging, "_read_ahead", lambda tensor: everyone.wait())
    with Staging(CPU, readers=3) as stage:
        assert len(list(stage.bring([torch.zeros(5000, dtype=torch.uint8)] * 6))) == 6


def test_what_a_reader_meets_is_raised_to_the_caller_and_ends_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: torch.Tensor) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(staging, "_read_ahead", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(bring_layers({1: make_layer(1)}, CPU))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("staging")]


def test_a_caller_who_stops_early_leaves_no_reader_behind() -> None:
    layers = bring_layers({number: make_layer(number) for number in range(4)}, CPU)
    next(layers)
    del layers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("staging")]


def test_kinds_of_weights_are_kept() -> None:
    ((_, brought),) = bring_layers({1: make_layer(1)}, CPU)
    assert isinstance(brought.experts[0].gate, Int4Weight)
    assert brought.shared is not None
    assert isinstance(brought.shared.down, Fp8BlockWeight)


@pytest.mark.gpu
def test_tensors_reach_a_gpu_whole_while_memory_is_used_again() -> None:
    """Each is dropped with work on it still to come, so that later ones get its memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randint(-9, 9, (9_000_000 + n,), generator=generator, dtype=torch.int8) for n in range(40)]
    busy = torch.ones(4096, 4096, device=device)
    sums = []
    with Staging(device, readers=4) as stage:
        for tensor in stage.bring(iter(sources)):
            busy = busy @ busy * 0.0002
            sums.append((tensor.long() * torch.arange(len(tensor), device=device)).sum())
            del tensor
    expected = [int((source.long() * torch.arange(len(source))).sum()) for source in sources]
    assert [int(total) for total in sums] == expected


@pytest.mark.gpu
def test_tensors_that_are_on_the_gpu_stay_where_they_are() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = torch.arange(10, device=device)
    with Staging(device) as stage:
        assert next(stage.bring([tensor])).data_ptr() == tensor.data_ptr()
