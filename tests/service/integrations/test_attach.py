"""What is replaced in a model, what is sent, and what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from moe_forward.client import RequestRefused
from moe_forward.integrations.transformers import attach
from moe_forward.integrations.transformers.agreement import shown

from .fake_service import FakeService
from .tiny_models import CONFIGS, LAYERS, make_model, prompts

# warnings of transformers about itself are not about this package
pytestmark = pytest.mark.filterwarnings("ignore")

URL = "http://moe.test"
FAMILIES = list(CONFIGS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    return make_model(family)


@pytest.fixture(scope="module")
def deepseek() -> Any:
    return make_model("DeepseekV3")


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def test_every_moe_layer_is_asked_for_by_its_id(model: Any, family: str) -> None:
    service = FakeService(family=family)
    with attach(model, URL, transport=service) as attached, torch.no_grad():
        model(prompts(model, rows=2, tokens=7))
    assert list(attached.layers) == LAYERS[family]
    assert [forward["layer"] for forward in service.forwards] == LAYERS[family]
    assert service.rows() == [14] * len(LAYERS[family])
    assert all(forward["shared"] and "topk_ids" not in forward for forward in service.forwards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_keeps_shape_and_type_and_gives_the_service_s_output(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    hidden = torch.randn(2, 3, 256).to(dtype)
    with attach(model, URL, transport=FakeService(family=family)):
        output = blocks(model)[2](hidden)
    assert output.dtype == dtype
    assert torch.equal(output, hidden * 4)


def test_the_local_gate_s_choice_is_sent_and_shared_experts_come_once(model: Any, family: str) -> None:
    service = FakeService(family=family)
    block = blocks(model)[2]
    hidden = torch.randn(2, 3, 256)
    chosen: list[torch.Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda module, inputs: chosen.extend(inputs[1:3]))
    with torch.no_grad():
        block(hidden)
        hook.remove()
        with attach(model, URL, gate="local", transport=service):
            output = block(hidden)
    (sent,) = service.forwards
    assert torch.equal(sent["topk_ids"], chosen[0])
    assert torch.equal(sent["topk_weights"], chosen[1])
    assert sent["shared"]
    assert torch.equal(output, hidden * 4)


def test_router_logits_of_the_local_gate_are_still_given(model: Any, family: str) -> None:
    with attach(model, URL, gate="local", transport=FakeService(family=family)), torch.no_grad():
        logits = model.model(prompts(model), output_router_logits=True).router_logits
    assert [list(layer.shape) for layer in logits] == [[14, 8]] * len(LAYERS[family])


def test_only_the_named_layers_are_attached_and_others_may_go_elsewhere(model: Any, family: str) -> None:
    first, second = FakeService([1], family), FakeService([2], family)
    before = blocks(model)
    with (
        attach(model, URL, layers=[1], transport=first),
        attach(model, URL, layers=[2], transport=second),
        torch.no_grad(),
    ):
        assert blocks(model)[0] is before[0]
        model(prompts(model))
    assert ([f["layer"] for f in first.forwards], [f["layer"] for f in second.forwards]) == ([1], [2])


@pytest.mark.parametrize("gate", ["server", "local"])
def test_detach_puts_back_the_very_modules_and_closes_the_connections(model: Any, family: str, gate: Any) -> None:
    service = FakeService(family=family)
    before = dict(model.named_modules())
    with torch.no_grad():
        expected = model(prompts(model)).logits
        attached = attach(model, URL, gate=gate, transport=service)
        assert dict(model.named_modules()).keys() != before.keys()
        attached.detach()
        attached.detach()
        assert dict(model.named_modules()) == before
        assert torch.equal(model(prompts(model)).logits, expected)
    assert service.closed
    assert service.forwards == []


def test_an_error_inside_the_context_still_detaches(model: Any, family: str) -> None:
    before = blocks(model)
    with pytest.raises(KeyError), attach(model, URL, transport=FakeService(family=family)):
        raise KeyError
    assert blocks(model) == before


def test_the_server_s_refusal_is_raised_with_its_message(model: Any, family: str) -> None:
    service = FakeService(
        family=family, refusal=(413, "too_many_tokens", "hidden_states has 14 tokens, expected at most 8")
    )
    with (
        attach(model, URL, transport=service),
        pytest.raises(RequestRefused, match="has 14 tokens, expected at most 8") as raised,
    ):
        model.generate(prompts(model), max_new_tokens=2)
    assert (raised.value.status, raised.value.code, raised.value.request_id) == (413, "too_many_tokens", "r-1")


@pytest.mark.parametrize("gate", ["server", "local"])
def test_long_inputs_go_in_several_requests_in_their_order(deepseek: Any, gate: Any) -> None:
    service = FakeService()
    hidden = torch.randn(2, 5, 256)
    with attach(deepseek, URL, gate=gate, max_request_tokens=4, transport=service):
        output = blocks(deepseek)[1](hidden)
    assert service.rows() == [4, 4, 2]
    assert torch.equal(output, hidden * 3)


def test_backward_through_the_service_is_an_error_and_not_a_missing_gradient(deepseek: Any) -> None:
    with attach(deepseek, URL, transport=FakeService()):
        loss = deepseek(prompts(deepseek)).logits.sum()
        with pytest.raises(NotImplementedError, match="layer 2 is computed by a moe-forward service"):
            loss.backward()


def test_the_weights_of_attached_blocks_are_freed_with_the_handle() -> None:
    model = make_model("DeepseekV3")
    weights = weakref.ref(blocks(model)[1].experts)
    attached = attach(model, URL, transport=FakeService())
    assert weights() is not None
    del attached
    gc.collect()
    assert weights() is None
    with torch.no_grad():
        model(prompts(model))


def test_blocks_on_the_meta_device_are_enough() -> None:
    model = make_model("DeepseekV3")
    for block in blocks(model)[1:]:
        block.to("meta")
    with attach(model, URL, transport=FakeService()), torch.no_grad():
        assert bool(model(prompts(model)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ({"hidden_size": 512}, "hidden_size 256 in the model, 512 served"),
        ({"num_experts": 16, "top_k": 4}, "num_experts 8 in the model, 16 served; top_k 2 in the model, 4 served"),
        ({"model": None}, "columns of hidden_states 256 in the model, None served"),
        ({"shared_experts": False}, "another one: shared_experts True in the model, False served"),
        ({"gate": "softmax"}, "another one: gate deepseek_v3 in the model, softmax served"),
        ({"layers": [0, 1]}, r"layers 2 of the model are not served; the service's model 'fake' has 0-1"),
    ],
    ids=["hidden size", "experts and top-k", "not this service", "shared experts", "gate", "layers"],
)
def test_a_service_of_another_model_is_refused(deepseek: Any, served: dict[str, Any], message: str) -> None:
    service, before = FakeService(placement=served), blocks(deepseek)
    with pytest.raises(ValueError, match=message):
        attach(deepseek, URL, transport=service)
    assert blocks(deepseek) == before
    assert service.closed


def test_a_gate_of_another_kind_is_no_matter_where_the_model_routes(deepseek: Any) -> None:
    with attach(deepseek, URL, gate="local", transport=FakeService(placement={"gate": "softmax"})) as attached:
        assert attached.layers == (1, 2)


def test_a_model_without_shared_experts_takes_a_service_without() -> None:
    model = make_model("DeepseekV3", n_shared_experts=0)
    with pytest.raises(ValueError, match="shared_experts False in the model, True served"):
        attach(model, URL, transport=FakeService())
    with attach(model, URL, transport=FakeService(placement={"shared_experts": False})) as attached:
        assert attached.layers == (1, 2)


def test_metadata_that_differ_from_the_model_are_refused() -> None:
    model = make_model("Qwen3Moe", num_experts_per_tok=4)
    with pytest.raises(ValueError, match="columns of topk_ids 4 in the model, 2 served"):
        attach(model, URL, transport=FakeService(family="Qwen3Moe", placement={"top_k": 4}))


@pytest.mark.parametrize("layers", [[0, 1], [7], []], ids=["a dense one", "beyond the model", "none"])
def test_layers_without_experts_are_refused(deepseek: Any, layers: list[int]) -> None:
    with pytest.raises(ValueError, match="layers: expected MoE layers of the model, which are 1-2, got"):
        attach(deepseek, URL, layers=layers, transport=FakeService())


@pytest.mark.parametrize("gate", ["server", "local"])
def test_a_layer_is_attached_once(deepseek: Any, gate: Any) -> None:
    with attach(deepseek, URL, layers=[2], gate=gate, transport=FakeService()):
        with pytest.raises(ValueError, match="layers: 2 are attached already"):
            attach(deepseek, URL, transport=FakeService())
        with attach(deepseek, URL, layers=[1], transport=FakeService()) as other:
            assert other.layers == (1,)


def test_models_without_a_known_block_are_refused(deepseek: Any) -> None:
    with pytest.raises(ValueError, match="a model_type of deepseek_v3, mixtral, qwen3_moe, got 'llama'"):
        attach(make_model("Llama"), URL, transport=FakeService())
    with pytest.raises(ValueError, match="got None"):
        attach(torch.nn.Linear(2, 2), URL, transport=FakeService())
    with pytest.raises(ValueError, match="expected decoder layers with a DeepseekV3MoE, found none"):
        attach(make_model("DeepseekV3", first_k_dense_replace=3), URL, transport=FakeService())


def test_router_logits_are_not_promised_by_the_server_s_gate() -> None:
    model = make_model("Qwen3Moe", output_router_logits=True)
    with pytest.raises(ValueError, match='use gate="local"'):
        attach(model, URL, transport=FakeService())


@pytest.mark.parametrize(("options", "message"), [({"gate": "none"}, "gate"), ({"max_request_tokens": 0}, "got 0")])
def test_wrong_options_are_refused(deepseek: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(deepseek, URL, transport=FakeService(), **options)


def test_a_decoder_without_a_head_can_be_attached(deepseek: Any) -> None:
    service = FakeService()
    with attach(deepseek.model, URL, transport=service), torch.no_grad():
        deepseek.model(prompts(deepseek))
    assert [forward["layer"] for forward in service.forwards] == [1, 2]


def test_layers_are_shown_as_ranges() -> None:
    assert shown([3, 5, 4, 8]) == "3-5, 8"
    assert shown([]) == "none"
