"""Triton's own client, unchanged, as a client of the protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

http = pytest.importorskip("tritonclient.http")


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_asks_for_health_metadata_and_inference(
    front: Any, kit: Any, serve: Any, binary: bool, version: str
) -> None:
    states = kit.states(3)
    client = http.InferenceServerClient(serve(front).url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny", version)
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.get_model_metadata("tiny", version)["name"] == "tiny"
        tensor = http.InferInput("hidden_states", list(states.shape), "FP32")
        tensor.set_data_from_numpy(states, binary_data=binary)
        wanted = [http.InferRequestedOutput("output", binary_data=binary)]
        result = client.infer("tiny", [tensor], version, wanted, request_id="7", parameters={"layer": 1})
        assert np.array_equal(result.as_numpy("output"), states * 2)
        assert result.get_response()["id"] == "7"
        with pytest.raises(http.InferenceServerException, match=r"model: expected .tiny., got .other.") as caught:
            client.infer("other", [tensor], version)
        assert caught.value.status() == "404"
    finally:
        client.close()
