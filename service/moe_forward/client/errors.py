"""What a call of the client can end with, other than its result."""

from __future__ import annotations

from moe_forward.errors import MoEForwardError


class MissingExperts(UserWarning):
    """A result lacks what some experts would have added: the service goes on without them (`on_rank_loss: degrade`).

    `warnings.simplefilter("error", MissingExperts)` makes such a result an error; `placement()["missing_experts"]` says
    which experts they are.
    """


class MoEForwardClientError(MoEForwardError):
    """A call did not get its result.

    message: one sentence; the server's own where the server answered.
    status: HTTP status of the answer, None where none came.
    code: slug of `moe_forward.errors.ErrorCode`, empty where the server sent none.
    request_id: names the call in the server's logs.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id


class RequestRefused(MoEForwardClientError):
    """The request itself is at fault (4xx): sending it again gives the same answer."""


class Unavailable(MoEForwardClientError):
    """The service cannot take the request now (429 or 503).

    retry_after_seconds: when the server says trying again makes sense, None where it does not say.
    """

    retry_after_seconds: float | None = None


class DeadlineExceeded(MoEForwardClientError):
    """The time for the call ran out: at the server (408, 504) or while the client was waiting."""


class ServerFailed(MoEForwardClientError):
    """The service failed over this request (500 and other 5xx)."""


class TransportFailed(MoEForwardClientError):
    """No usable answer: connection refused or lost, or a reply that is not what was asked for."""
