"""The memory of a rank before it loads: exact where shapes decide, and in words where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moe_forward import checkpoint, memory_plan
from moe_forward.checkpoint.presets import PRESETS
from moe_forward.checkpoint.synthetic import write_model
from moe_forward.config import Config
from moe_forward.errors import StartError
from moe_forward.experts import LayerExperts
from moe_forward.experts.packing import PackedLayer, pack_layers
from moe_forward.main import main
from moe_forward.memory_plan import MemoryItem, MemoryPlan
from moe_forward.types import GateSpec, ModelSpec
from w4afp8.linear import slice_weight

R1 = ModelSpec("r1", 7168, 2048, 256, 8, 2048, tuple(range(3, 61)), 128, GateSpec("deepseek_v3", 8, 4))
K2 = ModelSpec("k2", 7168, 2048, 384, 8, 2048, tuple(range(1, 61)), 32, GateSpec("deepseek_v3", 1, 1))
GB = 10**9
plan = partial(memory_plan.plan, max_graph_tokens=Config().max_graph_tokens)
H200_BYTES = 140 * GB
"""What a context leaves of its 141 GB."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    write_model(replace(PRESETS["tiny"], hidden_size=384, intermediate_size=256), folder, 2, progress=False)
    return folder


def size(plan: MemoryPlan, name: str) -> int:
    items = {item.name: item.size_bytes for item in (*plan.weights, *plan.loading, *plan.serving)}
    return items[name]


def packed_bytes(layer: PackedLayer) -> int:
    weights = [weight for experts in layer if experts is not None for weight in experts]
    return sum(weight.blocks.nbytes + weight.channel_scales.nbytes for weight in weights)


def held(folder: Path, experts: range) -> dict[int, checkpoint.LayerWeights]:
    spec = checkpoint.read_spec(folder)
    return checkpoint.load_shard(folder, spec, spec.layers, experts, read=False)


def test_packed_weights_are_counted_to_the_byte(model: Path) -> None:
    weights = held(model, range(11))
    layers = {number: LayerExperts(layer.experts, layer.shared) for number, layer in weights.items()}
    packed = pack_layers(layers, torch.device("cpu"))
    planned = plan(checkpoint.read_spec(model), 3, "deepep", "cutlass", 64, "token")  # shares of 10, 11 and 11 experts
    expected = sum(packed_bytes(layer) for layer in packed.values())
    assert size(planned, "routed experts") + size(planned, "shared experts") == expected


def test_mapped_weights_and_routers_are_counted_to_the_byte(model: Path) -> None:
    weights = held(model, range(16)).values()
    planned = plan(checkpoint.read_spec(model), 2, "gloo", "reference", 64, "token_group")
    routers = sum(
        layer.gate_weight.nbytes + (0 if layer.gate_bias is None else layer.gate_bias.nbytes) for layer in weights
    )
    mapped = sum(layer.nbytes for layer in weights) - routers
    assert size(planned, "routed experts") + size(planned, "shared experts") == mapped
    sliced = sum(tensor.nbytes for layer in weights for tensor in slice_weight(layer.gate_weight))
    biases = sum(layer.gate_bias.nbytes for layer in weights if layer.gate_bias is not None)
    assert size(planned, "routers") == sliced + biases
    assert planned.total_bytes == mapped + sliced + biases


def test_a_model_without_shared_experts_counts_none() -> None:
    spec = replace(R1, shared_intermediate_size=0)
    assert size(plan(spec, 8, "nccl", "cutlass", 128, "token"), "shared experts") == 0
    assert size(plan(spec, 8, "nccl", "cutlass", 128, "token"), "shared experts' rows") == 0
    assert size(plan(spec, 8, "gloo", "reference", 128, "token"), "shared experts") == 0


def test_rows_of_the_worst_case_have_room() -> None:
    for exchange, ranks, tokens, rows in (
        ("local", 1, 100, 100 * 8),
        ("deepep", 8, 100, 8 * 100 * 8),
        ("nccl", 64, 100, 64 * 100 * 4),  # 4 experts a rank: a token can reach no more there
    ):
        planned = plan(R1, ranks, exchange, "cutlass", tokens, "token_group")
        assert size(planned, "activated rows") == rows * 2048 * 4
        assert size(planned, "activated rows in fp8") == rows * (2048 + 16 * 4 + 1)
        assert size(planned, "experts' output") == rows * 7168 * 2
        assert size(planned, "rows on their way") > rows * 7168


def test_deepseek_r1_on_eight_gpus_is_what_is_known_of_it() -> None:
    planned = plan(R1, 8, "deepep", "cutlass", 1024, "token")
    blocks = 58 * 32 * (4096 * 7168 + 7168 * 2048) // (128 * 128)  # of 8448 bytes
    scales = 58 * 32 * (4096 + 7168) * 4
    assert size(planned, "routed experts") == blocks * 8448 + scales
    assert 45 * GB < planned.total_bytes < 60 * GB
    assert 100 * 2**20 < size(planned, "DeepEP's buffer") < 200 * 2**20  # DeepEP's own hint: 8 ranks, 1024 tokens


def test_kimi_k2_fits_on_eight_h200_and_not_on_four() -> None:
    eight, four = (plan(K2, ranks, "deepep", "cutlass", 1024, "token") for ranks in (8, 4))
    assert size(eight, "routed experts") > 60 * 48 * 3 * 7168 * 2048 / 2, "and scales of groups of 32"
    eight.check(H200_BYTES)
    with pytest.raises(StartError, match=r"serve \d+ of the 60 layers"):
        four.check(H200_BYTES)


@pytest.mark.parametrize("exchange", ["local", "nccl", "deepep"])
def test_more_tokens_take_more_and_more_ranks_hold_less(exchange: str) -> None:
    ranks = 1 if exchange == "local" else 4
    few, many = (plan(R1, ranks, exchange, "cutlass", tokens, "token") for tokens in (64, 4096))
    assert few.weights == many.weights
    assert few.loading == many.loading
    assert sum(item.size_bytes for item in few.serving) < sum(item.size_bytes for item in many.serving)
    if exchange != "local":
        assert plan(R1, 8, exchange, "cutlass", 64, "token").total_bytes < few.total_bytes


def test_memory_of_graphs_follows_the_largest_of_them() -> None:
    none, few, many, all_sizes = (
        plan(R1, 4, "deepep", "cutlass", 2048, "token", max_graph_tokens=tokens) for tokens in (0, 100, 1024, 10**6)
    )
    assert {item.name for item in few.serving} - {item.name for item in none.serving} == {"memory of graphs", "graphs"}
    assert size(few, "graphs") == 58 * 8 * 5 << 20  # 1 to 96 tokens; graphs of 100 would never be used
    assert size(many, "graphs") == 58 * 12 * 5 << 20
    assert size(few, "memory of graphs") < size(many, "memory of graphs") / 5
    assert all_sizes == plan(R1, 4, "deepep", "cutlass", 2048, "token", max_graph_tokens=2048)


def test_a_plan_that_fits_passes_and_one_byte_less_does_not() -> None:
    planned = plan(R1, 4, "deepep", "cutlass", 2048, "token")
    planned.check(planned.total_bytes)
    with pytest.raises(StartError):
        planned.check(planned.total_bytes - 1)


def test_what_does_not_fit_is_refused_with_numbers_and_advice() -> None:
    planned = plan(R1, 4, "deepep", "cutlass", 2048, "token")
    with pytest.raises(StartError) as refused:
        planned.check(60 * GB)
    text = str(refused.value)
    assert "64 of 256 experts each, 2048 tokens, exchange deepep: needs " in text
    assert "the GPU has 60.00 GB free" in text
    assert "or use more ranks (ranks), or lower max_step_tokens, max_rank_tokens or max_graph_tokens" in text
    assert str(planned) in text
    advised = int(text.split("serve ")[1].split(" of the 58 layers (layers)")[0])
    fits, too_many = (replace(R1, layers=R1.layers[:count]) for count in (advised, advised + 4))
    plan(fits, 4, "deepep", "cutlass", 2048, "token").check(60 * GB)
    with pytest.raises(StartError):
        plan(too_many, 4, "deepep", "cutlass", 2048, "token").check(60 * GB)


def test_fewer_tokens_are_not_advised_where_loading_takes_most() -> None:
    with pytest.raises(StartError) as refused:
        plan(R1, 1, "local", "cutlass", 64, "token").check(60 * GB)
    assert "max_step_tokens" not in str(refused.value)


def test_where_not_even_a_layer_fits_no_number_of_layers_is_advised() -> None:
    with pytest.raises(StartError, match=r"0\.10 GB free; serve fewer layers \(layers\)"):
        plan(R1, 4, "deepep", "cutlass", 2048, "token").check(GB // 10)


def test_the_table_adds_up() -> None:
    items = (MemoryItem("a", 3 * GB, "why"), MemoryItem("b", 2 * GB))
    table = str(MemoryPlan("of a rank", items, (MemoryItem("c", 4 * GB),), (MemoryItem("d", GB),), 1))
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["of", "a", "rank"]
    assert rows[1] == ["weights", "5.00", "GB"]
    assert rows[2] == ["a", "3.00", "GB", "why"]
    assert rows[-1][:4] == ["at", "most", "9.00", "GB"]


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
        plan(R1, 4, "deepep", "cutlass", 0, "token")


def test_inspect_prints_the_plan_of_a_device(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = checkpoint.read_spec(model)
    assert main(["inspect", str(model), "--ranks", "4"]) == 0
    assert "memory of a rank" not in capsys.readouterr().out
    assert main(["inspect", str(model), "--ranks", "4", "--layers", "2", "--device", "cuda"]) == 0
    one = replace(spec, layers=(2,))
    assert str(plan(one, 4, "deepep", "cutlass", 2048, "token")) in capsys.readouterr().out
    options = ["--device", "cuda", "--exchange", "nccl", "--max-step-tokens", "100"]
    assert main(["inspect", str(model), "--ranks", "3", *options]) == 0
    assert str(plan(spec, 3, "nccl", "cutlass", 34, "token")) in capsys.readouterr().out
    assert main(["inspect", str(model), "--device", "cpu"]) == 0
    assert str(plan(spec, 1, "local", "reference", 4096, "token")) in capsys.readouterr().out
