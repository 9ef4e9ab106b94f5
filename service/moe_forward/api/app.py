"""The application: FastAPI for every call but the two that carry tensors, one error form for all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from moe_forward.api.admin import admin_router
from moe_forward.api.availability import Availability
from moe_forward.api.errors import FRAMEWORK_CODES, render
from moe_forward.api.forward import ForwardParts, ForwardRoute
from moe_forward.api.keys import DOCS, DRAIN, HEALTH, ApiKeyMiddleware, ApiKeys
from moe_forward.api.openapi import describe
from moe_forward.api.ports import Link
from moe_forward.api.reports import Reports
from moe_forward.api.request_id import HEADER, RequestIdMiddleware, note_request_id, request_id
from moe_forward.api.status import status_router
from moe_forward.api.tensor_paths import FORWARD, inference_target
from moe_forward.config import Config
from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.metrics import Metrics, package_version
from moe_forward.tracing import Tracer
from moe_forward.types import ModelSpec
from moe_forward.wire import OIP, Encoding, WireLimits, for_content_type

JSON_HEADER_LENGTH = "inference-header-content-length"


def create_app(
    config: Config,
    spec: ModelSpec,
    link: Link,
    metrics: Metrics,
    admin_token: str | None,
    tracer: Tracer | None = None,
    reports: Reports | None = None,
    drain_others: Callable[[], Awaitable[int]] | None = None,
) -> FastAPI:
    """Build the HTTP front end of one engine.

    link: to the engine; the application takes over its `on_report`, `on_queue` and `on_status`.
    admin_token: secret of POST /v1/drain, or None to forbid that call.
    tracer: told of every request and step, or None.
    reports: what is known of steps; default: what `link` tells, in `metrics` and `tracer` too.
    drain_others: drains the service's other front ends, and returns how many forwards they are serving; None where
        there are none.
    Returns: the application. `app.state.drain()` starts draining (the server's SIGTERM), `app.state.draining` says
        whether it has begun, `app.state.availability.inflight` counts the forwards being served.
    Raises: ConfigError when the configuration names API keys that cannot be read.
    """
    availability = Availability(link)
    if reports is None:
        reports = Reports(link, spec.name, metrics, tracer)
    # A number takes two bytes of JSON at least, so this is more than a request in JSON could ask for.
    max_json_values = config.max_json_bytes // 2
    limits = WireLimits(spec, config.max_request_tokens, config.max_timeout_seconds, max_json_values)
    parts = ForwardParts(config, limits, link, availability, metrics, tracer)
    own = ForwardRoute("/v1/moe/forward", lambda headers: _own_encoding(config, headers), parts)
    oip = ForwardRoute("/v2/models/{model}/infer", lambda headers: _oip_encoding(config, headers), parts)
    app = _Application(
        title="moe-forward",
        summary="The MoE part of a transformer layer as a service.",
        version=package_version("moe-forward"),
        docs_url="/docs" if config.docs else None,
        openapi_url="/openapi.json" if config.docs else None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        # no `methods`: the routes refuse other methods themselves, in the form of all errors
        routes=[
            Route("/v1/moe/forward", own),
            Route("/v2/models/{model}/infer", oip),
            Route("/v2/models/{model}/versions/{version}/infer", oip),
        ],
    )
    if config.api_keys_file is not None:
        open_paths = (*HEALTH, DRAIN, *DOCS) if config.docs else (*HEALTH, DRAIN)
        keys = ApiKeys(config.api_keys_file)
        app.add_middleware(ApiKeyMiddleware, keys, metrics, open_paths)
        app.answer_first(ApiKeyMiddleware(own, keys, metrics, ()), ApiKeyMiddleware(oip, keys, metrics, ()))
    else:
        app.answer_first(own, oip)
    app.add_middleware(RequestIdMiddleware)  # around the keys: a refusal has an id too
    app.add_exception_handler(ForwardError, _refused)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(Exception, _failed)

    def drain() -> None:
        availability.drain()
        app.state.draining = True

    async def drain_all() -> int:
        drain()
        return availability.inflight + (0 if drain_others is None else await drain_others())

    app.state.draining = False
    app.state.drain = drain
    app.state.availability = availability
    app.include_router(status_router(spec, link, availability, reports))
    app.include_router(admin_router(metrics, admin_token, drain_all))
    describe(app, spec, keys=config.api_keys_file is not None)
    return app


class _Application(FastAPI):
    """FastAPI, which is not asked about the tensor calls: its layers would cost them more than their own work."""

    def answer_first(self, own: ASGIApp, oip: ASGIApp) -> None:
        """Have the tensor calls answered by these; they are routes of the framework too, for its description."""
        self._own = own
        self._oip = oip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] == "http" and not scope.get("root_path"):
            path = scope["path"]
            target = None if path == FORWARD else inference_target(path)
            if path == FORWARD or target is not None:
                note_request_id(scope)
                if target is not None:
                    scope["path_params"] = {"model": target[0], "version": target[1]}
                await (self._own if target is None else self._oip)(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def _own_encoding(config: Config, headers: Mapping[str, str]) -> tuple[Encoding, int]:
    encoding = for_content_type(headers.get("content-type"))
    return encoding, config.max_json_bytes if encoding.name == "json" else config.max_body_bytes


def _oip_encoding(config: Config, headers: Mapping[str, str]) -> tuple[Encoding, int]:
    """The protocol's JSON part is bounded like any JSON; clients of the protocol send any content type or none."""
    json_length = headers.get(JSON_HEADER_LENGTH)
    if json_length is None:
        return OIP, config.max_json_bytes
    digits = json_length.strip()
    if digits.isascii() and digits.isdigit() and (len(digits) > 19 or int(digits) > config.max_json_bytes):
        raise ForwardError(
            ErrorCode.TOO_LARGE,
            f"Inference-Header-Content-Length: expected at most {config.max_json_bytes}, got {digits[:40]}",
        )
    return OIP, config.max_body_bytes


def _respond(error: ForwardError, request: Request, headers: Mapping[str, str] | None = None) -> Response:
    rendered = render(error, request_id(request.scope))
    return Response(rendered.body, rendered.status, {**dict(rendered.headers), **(headers or {})})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ForwardError)
    return _respond(error, request)


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = FRAMEWORK_CODES.get(error.status_code, ErrorCode.INTERNAL)
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    return _respond(ForwardError(code, message), request, headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Answer a bug; the framework raises it again afterwards, so that the server logs it."""
    sentence = ForwardError(ErrorCode.INTERNAL, "internal error; the log has the details under this request id")
    # outside of the middleware, so the header is not there yet
    return _respond(sentence, request, {HEADER.decode(): request_id(request.scope)})
