"""The blocking client: a thin shell around httpx that does what `attempts` asks for."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from moe_forward.client.attempts import Attempt, Outcome, attempts
from moe_forward.client.calls import Call, Calls
from moe_forward.client.connection import DEFAULT_URL, connection_options
from moe_forward.client.replies import Reply
from moe_forward.client.trust import Cert, Verify

if TYPE_CHECKING:
    import numpy as np
    import torch

T = TypeVar("T")
ArrayT = TypeVar("ArrayT", "torch.Tensor", "np.ndarray[Any, Any]")


class Client:
    """Blocking client of one service; threads may share it.

    base_url: address of the HTTP front end. api_key: sent as bearer token; `read_api_key` takes one from a file.
    verify, cert: of https, as in `tls_settings`: whom to trust (a PEM file, say), and the client's own certificate.
    timeout_seconds: for a whole call, retries included, where the call names no other.
    retries: further attempts after a lost connection, 429 or 503; a forward can safely be sent twice.
    transport: httpx transport to use instead of the network, for tests.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        verify: Verify = True,
        cert: Cert | None = None,
        timeout_seconds: float = 30.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._calls = Calls(timeout_seconds, retries)
        self._http = httpx.Client(transport=transport, **connection_options(base_url, api_key, verify, cert))

    def forward(
        self,
        hidden_states: ArrayT,
        *,
        layer: int,
        hidden_scales: ArrayT | None = None,
        topk_ids: ArrayT | None = None,
        topk_weights: ArrayT | None = None,
        router_logits: ArrayT | None = None,
        shared_experts: bool = True,
        timeout_seconds: float | None = None,
        request_id: str | None = None,
    ) -> ArrayT:
        """Expert output of one MoE layer for some tokens.

        hidden_states: [..., H] bfloat16, float16, float32, or float8_e4m3fn with scales; torch or numpy (ml_dtypes).
        layer: id of the layer in the model.
        hidden_scales: [...], [..., 1] or [..., H/128] float32, multiply the float8_e4m3fn values.
        topk_ids: [..., K] int32 or int64, chosen experts. topk_weights: [..., K] float32, theirs.
        router_logits: [..., E] float32 or bfloat16; with neither these nor ids, the layer's own gate routes.
        shared_experts: add the shared experts' output, where the model has them.
        timeout_seconds: for the whole call. request_id: names it in the server's logs; default: a random one.
        Returns: [..., H], the kind of array, device and float type of hidden_states (bfloat16 for fp8).
        Raises: TypeError or ValueError for the arguments, before anything is sent; MoEForwardClientError.
        """
        call: Call[ArrayT] = self._calls.forward(
            hidden_states,
            layer=layer,
            hidden_scales=hidden_scales,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            router_logits=router_logits,
            shared_experts=shared_experts,
            timeout_seconds=timeout_seconds,
            request_id=request_id,
        )
        return self._run(call)

    def placement(self) -> dict[str, Any]:
        """The model's sizes and which rank holds which experts. Raises: MoEForwardClientError."""
        return self._run(self._calls.get("/v1/placement"))

    def ranks(self) -> dict[str, Any]:
        """State, place and memory of every rank. Raises: MoEForwardClientError."""
        return self._run(self._calls.get("/v1/ranks"))

    def metadata(self, model: str | None = None) -> dict[str, Any]:
        """Open Inference Protocol metadata of the server, or of `model`. Raises: MoEForwardClientError."""
        return self._run(self._calls.metadata(model))

    def ready(self) -> bool:
        """Whether the service takes requests now. Raises: TransportFailed when nothing answers at the address."""
        return self._run(self._calls.ready())

    def drain(self, admin_token: str) -> dict[str, Any]:
        """Finish what is in flight and refuse what is new. Raises: RequestRefused for a wrong token."""
        return self._run(self._calls.drain(admin_token))

    def close(self) -> None:
        """Close the connections; the client cannot be used again."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        asked = attempts(call)
        attempt = next(asked)
        while True:
            time.sleep(attempt.wait_seconds)
            outcome = self._send(attempt)
            try:
                attempt = asked.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result

    def _send(self, attempt: Attempt) -> Outcome:
        try:
            with self._http.stream(**attempt.arguments()) as response:
                chunks = []
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    attempt.check_deadline()
                return Reply(response.status_code, response.headers, b"".join(chunks))
        except httpx.RequestError as error:
            return error
