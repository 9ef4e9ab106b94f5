"""The call that changes something: draining, for whoever holds the admin token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from moe_forward.api.schemas import Drained, ErrorBody
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.metrics import Metrics

BEARER = HTTPBearer(auto_error=False, description="The token of admin_token_file.")


def check_token(expected: str | None, credentials: HTTPAuthorizationCredentials | None) -> None:
    """Let the holder of the admin token through; how long it takes says nothing about the token.

    Raises: ForwardError FORBIDDEN where no token is configured, UNAUTHORIZED where none or another one came.
    """
    if not expected:
        raise ForwardError(ErrorCode.FORBIDDEN, "this call needs admin_token_file in the configuration: it has none")
    if credentials is None:
        raise ForwardError(ErrorCode.UNAUTHORIZED, "Authorization: expected Bearer and the admin token, got none")
    if not hmac.compare_digest(credentials.credentials.encode(), expected.encode()):
        raise ForwardError(ErrorCode.UNAUTHORIZED, "Authorization: expected the admin token, got another one")


def admin_router(metrics: Metrics, admin_token: str | None, drain: Callable[[], Awaitable[int]]) -> APIRouter:
    """Return the admin routes. drain: refuse new forwards from now on; returns how many are being served."""
    router = APIRouter(tags=["admin"])

    @router.post(
        "/v1/drain",
        responses={
            401: {"model": ErrorBody, "description": "The token is missing or wrong."},
            403: {"model": ErrorBody, "description": "The service was started without an admin token."},
        },
    )
    async def start_draining(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> Drained:
        """Finish what is in flight, refuse what is new; returns at once and cannot be undone."""
        try:
            check_token(admin_token, credentials)
        except ForwardError as error:
            metrics.rejected(error.code)
            raise
        return Drained(inflight_requests=await drain())

    return router
