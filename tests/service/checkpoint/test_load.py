"""Loading a shard: bit equality with the file, and every refusal by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_forward.checkpoint import load_shard, read_spec
from moe_forward.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
Read = Callable[[Path], Tensors]
Change = Callable[[Path, Callable[[Tensors], object]], Path]
EXPERT = "model.layers.1.mlp.experts.3"


def load(folder: Path, experts: range = range(8)) -> None:
    load_shard(folder, read_spec(folder), [1, 2], experts)


def test_a_shard_equals_the_file_bit_for_bit(served: Path, read_all: Read) -> None:
    written = read_all(served)
    weights = load_shard(served, read_spec(served), [1, 2], range(3, 6))
    assert list(weights) == [1, 2]
    for layer, held in weights.items():
        prefix = f"model.layers.{layer}.mlp"
        assert len(held.experts) == 3
        for number, expert in enumerate(held.experts, start=3):
            for projection, matrix in expert._asdict().items():
                name = f"{prefix}.experts.{number}.{projection}_proj.weight"
                assert torch.equal(matrix.codes, written[name])
                assert torch.equal(matrix.scales, written[name + "_scale_inv"])
        assert held.shared is not None
        for projection, block in held.shared._asdict().items():
            name = f"{prefix}.shared_experts.{projection}_proj.weight"
            assert torch.equal(block.values.view(torch.uint8), written[name].view(torch.uint8))
            assert torch.equal(block.scales, written[name + "_scale_inv"])
        assert held.gate_weight.dtype == torch.float32
        assert torch.equal(held.gate_weight, written[f"{prefix}.gate.weight"].float())
        assert held.gate_bias is not None
        assert torch.equal(held.gate_bias, written[f"{prefix}.gate.e_score_correction_bias"])


def test_weights_outlive_the_files_they_are_mapped_from(served: Path, read_all: Read) -> None:
    written = read_all(served)
    weights = load_shard(served, read_spec(served), [1], range(8))
    for path in served.iterdir():
        path.unlink()
    assert torch.equal(weights[1].experts[7].down.codes, written["model.layers.1.mlp.experts.7.down_proj.weight"])


def test_a_rank_without_experts_holds_router_and_shared_expert(served: Path) -> None:
    held = load_shard(served, read_spec(served), [1], range(8, 8))[1]
    assert held.experts == ()
    assert held.shared is not None


def test_bytes_held_are_those_of_the_files_tensors_with_the_router_in_float32(served: Path, read_all: Read) -> None:
    held = load_shard(served, read_spec(served), [1], range(3, 6))[1]
    prefix = "model.layers.1.mlp."
    names = ("shared_experts.", "gate.", *(f"experts.{expert}." for expert in range(3, 6)))
    tensors = {name: tensor for name, tensor in read_all(served).items() if name.startswith(prefix)}
    kept = {name: tensor for name, tensor in tensors.items() if name.removeprefix(prefix).startswith(names)}
    widened = kept[f"{prefix}gate.weight"].nbytes  # bf16 in the file
    assert held.nbytes == sum(tensor.nbytes for tensor in kept.values()) + widened


def test_damage_in_another_ranks_experts_is_not_read(served: Path, changed: Change) -> None:
    changed(served, lambda tensors: tensors[f"{EXPERT}.up_proj.weight_scale_inv"].fill_(torch.nan))
    load(served, range(4, 8))
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
        load(served, range(4))


def test_progress_ends_at_the_total(served: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_shard(served, read_spec(served), [1], range(4), lambda done, total: calls.append((done, total)))
    assert len(calls) == 4
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1] > 0


def test_progress_is_told_without_experts_too(served: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_shard(served, read_spec(served), [1], range(0), lambda done, total: calls.append((done, total)))
    assert len(calls) == 1
    assert calls[0][0] == calls[0][1] > 0


def test_mapping_alone_gives_the_same_tensors_and_reads_and_checks_no_expert(served: Path, changed: Change) -> None:
    spec = read_spec(served)
    loaded, mapped = (load_shard(served, spec, [1], range(2, 5), read=read)[1] for read in (True, False))
    for one, other in zip((*loaded.experts, loaded.shared), (*mapped.experts, mapped.shared), strict=True):
        assert one is not None
        assert other is not None
        for weight, same in zip(one, other, strict=True):
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(weight, same, strict=True))
    assert torch.equal(mapped.gate_weight, loaded.gate_weight)
    changed(served, lambda tensors: tensors[f"{EXPERT}.up_proj.weight_scale_inv"].fill_(torch.nan))
    load_shard(served, spec, [1], range(8), lambda done, total: pytest.fail("nothing is read"), read=False)


def test_mapping_alone_refuses_what_headers_tell_and_routers_hold(served: Path, changed: Change) -> None:
    spec = read_spec(served)
    changed(served, lambda tensors: tensors["model.layers.1.mlp.gate.weight"].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"gate\.weight .*holds NaN or Inf"):
        load_shard(served, spec, [1], range(8), read=False)
    changed(served, lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"misses model\.layers\.1\.mlp\.experts\.3\.up_proj"):
        load_shard(served, spec, [1], range(8), read=False)


def test_undefined_codes_of_an_all_zero_group_are_forced_to_zero(served: Path, changed: Change) -> None:
    def zero_group(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.up_proj.weight_scale_inv"][5, 1] = 0
        tensors[f"{EXPERT}.up_proj.weight"][5] = -120

    changed(served, zero_group)
    codes = load_shard(served, read_spec(served), [1], range(8))[1].experts[3].up.codes
    assert codes[5].tolist() == [-120] * 64 + [0] * 64
    assert codes.dtype == torch.int8


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            replaced(f"{EXPERT}.up_proj.weight_scale_inv", torch.ones(128, 4)),
            r"experts\.3\.up_proj\.weight_scale_inv .*: group size 64",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_scale_inv", torch.ones(128, 1)),
            r"experts\.3\.up_proj\.weight_scale_inv .*: group size 256",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_scale_inv", torch.ones(128, 3)),
            r"weight_scale_inv .*: expected F32 \[128, 2\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight_scale_inv", torch.ones(128, 2).bfloat16()),
            r"weight_scale_inv \(BF16.*: expected F32 \[128, 2\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight", torch.ones(128, 256, dtype=torch.int8)),
            r"up_proj\.weight \(I8 \[128, 256\].*: expected I8 \[128, 128\]",
        ),
        (replaced(f"{EXPERT}.up_proj.weight_zero_point", torch.zeros(128, 2)), "weight_zero_point: zero points"),
        (replaced(f"{EXPERT}.up_proj.qzeros", torch.zeros(128, 2)), "qzeros: zero points"),
        (
            replaced(f"{EXPERT}.up_proj.g_idx", torch.zeros(256)),
            r"up_proj\.g_idx: an activation order .*cannot be served",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight", torch.zeros(128, 128).bfloat16()),
            r"up_proj\.weight \(BF16 \[128, 128\] .*: expected I8 or F8_E4M3 or .*\[128, 256\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight", torch.zeros(128, 256).to(torch.float8_e4m3fn)),
            r"up_proj\.weight_scale_inv \(F32 \[128, 2\].*: expected F32 \[1, 2\]",
        ),
        (
            replaced(f"{EXPERT}.up_proj.weight", torch.zeros(128, 256, dtype=torch.uint8)),
            r"up_proj\.weight \(U8 .*: expected I8 or F8_E4M3",
        ),
        (lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight"), r"misses model\.layers\.1\.mlp\.experts\.3\.up_proj"),
        (lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight_scale_inv"), r"misses .*up_proj\.weight_scale_inv"),
        (lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight"), r"misses model\.layers\.2\.mlp\.gate\.weight"),
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.gate.e_score_correction_bias"),
            r"misses .*e_score_correction_bias \(BF16 or F16 or F32 \[8\]\)",
        ),
        (
            replaced("model.layers.1.mlp.shared_experts.up_proj.weight", torch.zeros(128, 256, dtype=torch.int8)),
            r"shared_experts\.up_proj\.weight \(I8 .*: expected F8_E4M3 or BF16 or F16 or F32 \[128, 256\]",
        ),
        (
            replaced("model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv", torch.ones(128, 2)),
            r"shared_experts\.up_proj\.weight_scale_inv .*: expected F32 \[1, 2\]",
        ),
        (
            replaced("model.layers.1.mlp.gate.weight", torch.full((8, 256), torch.inf).bfloat16()),
            "gate.weight .*holds NaN or Inf",
        ),
        (replaced("model.layers.1.mlp.gate.weight", torch.zeros(9, 256)), r"gate\.weight .*expected .*\[8, 256\]"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(
    served: Path, changed: Change, edit: Callable[[Tensors], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(served, edit))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
@pytest.mark.parametrize("name", [f"{EXPERT}.down_proj", "model.layers.1.mlp.shared_experts.down_proj"])
def test_scales_that_are_no_scales_are_refused(served: Path, changed: Change, name: str, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{name}.weight_scale_inv"][-1, -1] = value

    changed(served, spoil)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_scale_inv .*finite and not negative"):
        load(served)


def test_the_packing_of_gptq_and_awq_is_refused_by_name(served: Path, changed: Change) -> None:
    def repack(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.up_proj.qweight"] = tensors.pop(f"{EXPERT}.up_proj.weight").view(torch.int32)

    with pytest.raises(
        CheckpointError, match=r"up_proj\.qweight \(I32 .*: the packing of GPTQ and AWQ cannot be served"
    ):
        load(changed(served, repack))


def test_a_layer_without_experts_is_refused(served: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer 0 is not an MoE layer of .*; those are \[1, 2\]"):
        load_shard(served, read_spec(served), [0], range(8))


@pytest.mark.parametrize("experts", [range(7, 9), range(-1, 2), range(7, 3, -1)])
def test_experts_that_do_not_exist_are_refused(served: Path, experts: range) -> None:
    with pytest.raises(CheckpointError, match="are not within the 8 experts"):
        load(served, experts)
