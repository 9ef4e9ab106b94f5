"""The parameters `layer`, `shared_experts` and `timeout_ms`, wherever a request puts them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from moe_forward.errors import ErrorCode, ForwardError
from moe_forward.wire.base import WireLimits, WireRequest
from moe_forward.wire.text import shown

NAMES = ("layer", "shared_experts", "timeout_ms")
_HEADERS = tuple(
    (header, name)
    for name in NAMES
    # a set of spellings, since `layer` has no underscore to write as a dash
    for spelling in dict.fromkeys((name, name.replace("_", "-")))
    for header in (spelling, f"x-moe-{spelling}")
)

PARAMETER_HEADERS = tuple(header for header, _ in _HEADERS)
"""Headers that hold parameters."""

_Value = TypeVar("_Value", int, float, bool)


class Given(NamedTuple):
    """One parameter as it came.

    value: text, or a JSON value when `typed`. source: where it stood, for messages.
    """

    name: str
    value: object
    source: str
    typed: bool


class Parameters(NamedTuple):
    """The parameters of a forward; timeout_seconds is None where the request names no deadline."""

    layer: int
    shared_experts: bool
    timeout_seconds: float | None


def collect(request: WireRequest, body: Mapping[str, object], typed: bool) -> tuple[Given, ...]:
    """Gather the parameters from query, headers and body.

    body: what the body says; keys other than parameters are the encoding's business. typed: its values are JSON
        values (a layer is an integer), else strings.
    Returns: everything that was given, a parameter possibly several times.
    Raises: ForwardError INVALID_PARAMETER for an unknown or repeated query key.
    """
    seen: set[str] = set()
    for key, _ in request.query:
        if key not in NAMES:
            raise _invalid(f"query: expected only {', '.join(NAMES)}, got {shown(key)}")
        if key in seen:
            raise _invalid(f"query: expected {key} once, got it twice")
        seen.add(key)
    return (
        *(Given(key, value, "the query", typed=False) for key, value in request.query),
        *_from_headers(request.headers),
        *(Given(name, body[name], "the body", typed) for name in NAMES if name in body),
    )


def resolve(given: Sequence[Given], limits: WireLimits) -> Parameters:
    """Parse and check the parameters.

    Raises: ForwardError INVALID_PARAMETER for a missing layer, a value of the wrong type or range, or the same
        parameter given with different values; LAYER_NOT_FOUND for a layer that is not served.
    """
    max_milliseconds = limits.max_timeout_seconds * 1000

    def milliseconds(value: object, typed: bool) -> float | None:
        number = _number(value, typed)
        return number if number is not None and 0 < number <= max_milliseconds else None  # NaN fails both

    layer = _agreed("layer", "an integer", given, _integer)
    shared = _agreed("shared_experts", "true, false, 1 or 0", given, _boolean)
    timeout = _agreed("timeout_ms", f"a number in (0, {max_milliseconds:g}] milliseconds", given, milliseconds)
    if layer is None:
        raise _invalid("layer: expected an integer in query, header or body, got none")
    _check_served(layer, limits.spec.layers)
    return Parameters(layer, True if shared is None else shared, None if timeout is None else timeout / 1000)


def _from_headers(headers: Mapping[str, str]) -> Iterator[Given]:
    for header, name in _HEADERS:
        if header in headers:
            yield Given(name, headers[header].strip(), f"the header {header}", typed=False)


def _agreed(
    name: str, expected: str, given: Iterable[Given], parse: Callable[[object, bool], _Value | None]
) -> _Value | None:
    first: tuple[_Value, str] | None = None
    for item in given:
        if item.name != name:
            continue
        value = parse(item.value, item.typed)
        if value is None:
            raise _invalid(f"{name}: expected {expected}, got {shown(item.value)} in {item.source}")
        if first is None:
            first = (value, item.source)
        elif first[0] != value:
            raise _invalid(
                f"{name}: expected one value, got {shown(first[0])} in {first[1]} and {shown(value)} in {item.source}"
            )
    return None if first is None else first[0]


def _integer(value: object, typed: bool) -> int | None:
    if typed:
        return value if type(value) is int else None
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else None


def _boolean(value: object, typed: bool) -> bool | None:
    if typed:
        return bool(value) if type(value) is bool or (type(value) is int and value in (0, 1)) else None
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _number(value: object, typed: bool) -> float | None:
    if typed:
        # an integer beyond float's range is beyond every deadline too
        return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # type: ignore[arg-type]
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?([eE][+-]?[0-9]{1,3})?", value):
        return float(value)
    return None


def _check_served(layer: int, served: tuple[int, ...]) -> None:
    if layer in served:
        return
    some = ", ".join(map(str, served[:8])) + (f", ... {served[-1]}" if len(served) > 8 else "")
    raise ForwardError(
        ErrorCode.LAYER_NOT_FOUND,
        f"layer: expected one of the {len(served)} served layers ({some}), got {shown(layer)}",
    )


def _invalid(message: str) -> ForwardError:
    return ForwardError(ErrorCode.INVALID_PARAMETER, message)
