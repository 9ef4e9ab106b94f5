"""Sending spans to a collector by OTLP over HTTP, beside the service and never in its way.

The usual variables of OpenTelemetry apply: OTEL_TRACES_SAMPLER (default: every request, unless its client says that
it does not keep its trace), OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_*.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from moe_forward.metrics import package_version
from moe_forward.tracing.spans import SpanTracer

log = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
CLOSE_SECONDS = 5.0
QUIET_SECONDS = 60.0
SDK_LOGGER = "opentelemetry"


def create_tracer(endpoint: str, on_failure: Callable[[], None], exporter: SpanExporter | None = None) -> SpanTracer:
    """Make a tracer whose spans go to `endpoint`. See `moe_forward.tracing.start_tracer`.

    exporter: what sends them; default: one for OTLP over HTTP.
    """
    complain_seldom()
    url = traces_url(endpoint)
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    processor = BatchSpanProcessor(_Counted(exporter or OTLPSpanExporter(url), on_failure))
    provider.add_span_processor(processor)
    log.info("traces go to %s", url)
    tracer = provider.get_tracer("moe_forward")
    return SpanTracer(tracer, processor.on_end, provider.resource, lambda: _shut_down(provider))


def traces_url(endpoint: str) -> str:
    """Return where spans are sent: `endpoint`, or its /v1/traces where it has no path."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def complain_seldom() -> None:
    """Pass what OpenTelemetry logs on to our log, a line a minute: a collector that is down fails every few seconds."""
    logger = logging.getLogger(SDK_LOGGER)
    logger.propagate = False
    logger.handlers = [_Seldom(logging.WARNING)]


def _resource() -> Resource:
    made = Resource.create({"service.version": package_version("moe-forward")})
    if str(made.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        return made.merge(Resource({"service.name": "moe-forward"}))
    return made


def _shut_down(provider: TracerProvider) -> None:
    """Send what is left; a collector that does not answer holds nobody up for long."""
    sending = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
    sending.start()
    sending.join(CLOSE_SECONDS)
    if sending.is_alive():
        log.warning("the collector did not take the last spans within %g s", CLOSE_SECONDS)


class _Counted(SpanExporter):
    """Sends like `inner`, and calls `on_failure` for each batch that was not taken."""

    def __init__(self, inner: SpanExporter, on_failure: Callable[[], None]) -> None:
        self._inner = inner
        self._on_failure = on_failure

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        try:
            result = self._inner.export(spans)
        except Exception:
            self._on_failure()
            raise  # the SDK logs it
        if result is not SpanExportResult.SUCCESS:
            self._on_failure()
        return result

    def shutdown(self) -> None:
        """Stop sending."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what `inner` holds back."""
        return self._inner.force_flush(timeout_millis)


class _Seldom(logging.Handler):
    """Logs a record as a warning of ours, then none for `QUIET_SECONDS`; says how many were left out."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._silent_until = 0.0
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Log or count."""
        now = time.monotonic()
        if now < self._silent_until:
            self._left_out += 1
            return
        self._silent_until = now + QUIET_SECONDS
        log.warning("traces: %s (%d lines like this left out before)", record.getMessage(), self._left_out)
        self._left_out = 0
