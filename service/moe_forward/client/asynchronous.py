"""The asyncio client: a thin shell around httpx that does what `attempts` asks for."""

from __future__ import annotations

import asyncio
import ssl
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


class AsyncClient:
    """`Client` for asyncio: the same arguments, and the same calls to await; the tasks of one loop may share it."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        verify: Verify = True,
        cert: Cert | None = None,
        timeout_seconds: float = 30.0,
        retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._calls = Calls(timeout_seconds, retries)
        self._http = httpx.AsyncClient(transport=transport, **connection_options(base_url, api_key, verify, cert))

    async def forward(
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
        """As `Client.forward`."""
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
        return await self._run(call)

    async def placement(self) -> dict[str, Any]:
        """The model's sizes and which rank holds which experts. Raises: MoEForwardClientError."""
        return await self._run(self._calls.get("/v1/placement"))

    async def ranks(self) -> dict[str, Any]:
        """State, place and memory of every rank. Raises: MoEForwardClientError."""
        return await self._run(self._calls.get("/v1/ranks"))

    async def metadata(self, model: str | None = None) -> dict[str, Any]:
        """Open Inference Protocol metadata of the server, or of `model`. Raises: MoEForwardClientError."""
        return await self._run(self._calls.metadata(model))

    async def ready(self) -> bool:
        """Whether the service takes requests now. Raises: TransportFailed when nothing answers at the address."""
        return await self._run(self._calls.ready())

    async def drain(self, admin_token: str) -> dict[str, Any]:
        """Finish what is in flight and refuse what is new. Raises: RequestRefused for a wrong token."""
        return await self._run(self._calls.drain(admin_token))

    async def close(self) -> None:
        """Close the connections; the client cannot be used again."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        asked = attempts(call)
        attempt = next(asked)
        while True:
            await asyncio.sleep(attempt.wait_seconds)
            outcome = await self._send(attempt)
            try:
                attempt = asked.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result

    async def _send(self, attempt: Attempt) -> Outcome:
        try:
            async with self._http.stream(**attempt.arguments()) as response:
                chunks = []
                async for chunk in response.aiter_bytes():
                    chunks.append(chunk)
                    attempt.check_deadline()
                return Reply(response.status_code, response.headers, b"".join(chunks))
        except httpx.RequestError as error:
            return error
        except ssl.SSLError as error:  # a server's "certificate required" of TLS 1.3, which httpx lets through
            return httpx.ReadError(str(error))
