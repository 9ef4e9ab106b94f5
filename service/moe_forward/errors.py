"""Every error the service answers with, by its slug. Which HTTP status a slug becomes is `api.errors`' business."""

from __future__ import annotations

import enum


class ErrorCode(enum.IntEnum):
    """Why a forward was refused: the lower-case name is the `code` of a reply, the number travels on channels."""

    MALFORMED_BODY = 1
    MISSING_TENSOR = 2
    UNEXPECTED_TENSOR = 3
    WRONG_DTYPE = 4
    WRONG_SHAPE = 5
    OUT_OF_RANGE = 6
    INVALID_PARAMETER = 7
    UNAUTHORIZED = 8
    FORBIDDEN = 9
    NOT_FOUND = 10
    MODEL_NOT_FOUND = 11
    LAYER_NOT_FOUND = 12
    METHOD_NOT_ALLOWED = 13
    BODY_TIMEOUT = 14
    LENGTH_REQUIRED = 15
    TOO_LARGE = 16
    UNSUPPORTED_MEDIA_TYPE = 17
    NON_FINITE = 18
    QUEUE_FULL = 19
    INTERNAL = 20
    NOT_READY = 21
    DRAINING = 22
    RANK_LOST = 23
    DEADLINE_EXCEEDED = 24
    CANCELLED = 25
    MALFORMED_REQUEST = 26
    HEADERS_TOO_LARGE = 27
    HEADER_TIMEOUT = 28
    TOO_MANY_CONNECTIONS = 29

    @property
    def slug(self) -> str:
        """The code as clients see it."""
        return self.name.lower()


class MoEForwardError(Exception):
    """Base of everything this package raises on purpose."""


class ForwardError(MoEForwardError):
    """One request is refused.

    code: why.
    message: one sentence naming the tensor or parameter, what was expected and what came.
    retry_after_seconds: when trying again makes sense, or None.
    """

    def __init__(self, code: ErrorCode, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds


class ConfigError(MoEForwardError):
    """The configuration document or a flag is wrong; the message names the key."""


class CheckpointError(MoEForwardError):
    """A checkpoint is missing, corrupt or of a format that cannot be served exactly; the message names the part."""


class StartError(MoEForwardError):
    """The service cannot start; the message says what an operator can do."""


class ChannelClosed(MoEForwardError):
    """The process at the other end of a channel is gone."""
