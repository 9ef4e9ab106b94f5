"""An unmodified `tritonclient[http]` works against the service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton  # type: ignore[import-untyped]

from .forwards import NUMPY, Forward, as_numpy, as_safetensors, post, read_output
from .running import Service

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Any]:
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as connected:
        yield connected


def infer(client: Any, datatype: str, values: np.ndarray[Any, Any], binary: bool, **parameters: Any) -> Any:
    hidden = triton.InferInput("hidden_states", list(values.shape), datatype)
    hidden.set_data_from_numpy(values, binary_data=binary)
    wanted = triton.InferRequestedOutput("output", binary_data=binary)
    return client.infer("tiny", [hidden], outputs=[wanted], request_id="t-1", parameters={"layer": 1} | parameters)


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("another")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["name"] == "tiny"
    shapes = {tensor["name"]: tensor["shape"] for tensor in metadata["inputs"]}
    assert shapes["hidden_states"] == [-1, 256]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["output"]


@pytest.mark.parametrize("datatype", ["BF16", "FP16", "FP32"])
def test_binary_infer_is_bit_equal_to_the_own_call(
    client: Any, service: Service, random_forward: Callable[..., Forward], datatype: str
) -> None:
    dtypes = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
    forward = random_forward(11, 9, dtype=dtypes[datatype])
    own = as_numpy(read_output(post(service.url, as_safetensors(forward))))
    result = infer(client, datatype, as_numpy(forward.hidden), binary=True)
    output = result.as_numpy("output")
    assert output.dtype == np.dtype(NUMPY[datatype])
    assert output.tobytes() == own.tobytes()
    assert result.get_response()["id"] == "t-1"


def test_json_infer_gives_the_same_numbers(
    client: Any, service: Service, random_forward: Callable[..., Forward]
) -> None:
    forward = random_forward(12, 5, dtype=torch.float32)
    own = as_numpy(read_output(post(service.url, as_safetensors(forward))))
    output = infer(client, "FP32", as_numpy(forward.hidden), binary=False).as_numpy("output")
    assert output.tobytes() == own.tobytes()


def test_bfloat16_is_the_default_form_of_ml_dtypes(
    client: Any, service: Service, random_forward: Callable[..., Forward]
) -> None:
    forward = random_forward(13, 3, shared=False)
    values = forward.hidden.float().numpy().astype(ml_dtypes.bfloat16)
    own = as_numpy(read_output(post(service.url, as_safetensors(forward))))
    output = infer(client, "BF16", values, binary=True, shared_experts=False).as_numpy("output")
    assert output.tobytes() == own.tobytes()


def test_a_refusal_reaches_the_client_with_its_sentence(client: Any) -> None:
    values = np.zeros((1, 255), np.float32)
    with pytest.raises(triton.InferenceServerException, match="hidden_states: expected shape"):
        infer(client, "FP32", values, binary=True)
    with pytest.raises(triton.InferenceServerException, match="layer"):
        infer(client, "FP32", np.zeros((1, 256), np.float32), binary=True, layer=77)
