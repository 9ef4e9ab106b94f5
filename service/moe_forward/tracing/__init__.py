"""Traces of forward requests: their context from clients, and spans for an OpenTelemetry collector where one is named.

OpenTelemetry itself is imported only where `trace_endpoint` is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from moe_forward.errors import StartError
from moe_forward.request_record import RequestRecord
from moe_forward.tracing.context import TraceContext, trace_context
from moe_forward.types import StepReport

__all__ = ["TraceContext", "Tracer", "check_installed", "start_tracer", "trace_context"]


class Tracer(Protocol):
    """Makes spans of what a front end knows of its requests and of the engine's steps."""

    def request_started(self, record: RequestRecord, parent: TraceContext | None) -> Any:
        """Begin the span of a request and note its trace in `record`; `request_finished` takes what is returned."""
        ...

    def request_finished(self, span: Any, record: RequestRecord) -> None:
        """End a request's span, however the request ended, and make those of its parts."""
        ...

    def step_finished(self, report: StepReport) -> None:
        """Take in a step, for the spans of the requests that were in it."""
        ...

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        ...


def check_installed() -> None:
    """See that spans can be made.

    Raises: StartError naming the package that is missing.
    """
    try:
        import moe_forward.tracing.export  # noqa: F401
    except ImportError as error:
        raise StartError(
            f"trace_endpoint is set, but {error.name or error} is not installed; "
            "install it: pip install 'moe-forward[tracing]', or leave trace_endpoint out"
        ) from error


def start_tracer(endpoint: str, on_failure: Callable[[], None]) -> Tracer:
    """Start sending spans to an OpenTelemetry collector, in a thread of its own.

    endpoint: URL that takes OTLP over HTTP; one without a path means its /v1/traces.
    on_failure: called, on that thread, for each batch of spans that the collector did not take.
    Raises: StartError where OpenTelemetry is not installed.
    """
    check_installed()
    from moe_forward.tracing.export import create_tracer

    return create_tracer(endpoint, on_failure)
