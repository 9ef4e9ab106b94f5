"""JSON and shapes from strangers: parsed strictly, refused with a sentence."""

from __future__ import annotations

import collections
import json
import math
import reprlib

from moe_forward.errors import ErrorCode, ForwardError

MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 40
"""Far above any tensor that fits a body; keeps products of extents small numbers."""


def shown(value: object) -> str:
    """A client's value for an error message: printable, short and safe for any depth."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring, short.maxother = 2, 4, 4, 60, 60
    text = short.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def parse_object(data: memoryview, part: str) -> dict[str, object]:
    """Parse UTF-8 JSON that must be one object without duplicate keys (RFC 8259).

    data: the text's bytes. part: what it is, for messages.
    Returns: the object; NaN and Infinity, which JSON lacks but many writers emit, come as floats for the reader of
        the value to refuse by name.
    Raises: ForwardError MALFORMED_BODY.
    """
    try:
        value = json.loads(str(data, "utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise _malformed(f"{part}: expected UTF-8 JSON, byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"{part}: expected JSON, got {error.msg.lower()} at character {error.pos}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _malformed(f"{part}: expected JSON with numbers of a sane length, got: {error}") from error
    except RecursionError as error:
        raise _malformed(f"{part}: expected JSON a few levels deep, got one nested too deeply") from error
    if not isinstance(value, dict):
        raise _malformed(f"{part}: expected a JSON object, got {shown(value)}")
    return value


def parse_shape(name: str, value: object) -> tuple[int, ...]:
    """Check the `shape` of tensor `name`.

    Raises: ForwardError MALFORMED_BODY unless it is a list of at most 8 integers that are not negative.
    """
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise _malformed(
            f"{name}: expected shape to be a list of at most {MAX_DIMENSIONS} integers, got {shown(value)}"
        )
    for extent in value:
        if type(extent) is not int or not 0 <= extent < MAX_EXTENT:
            raise _malformed(f"{name}: expected shape of integers in [0, 2**40), got {shown(extent)}")
    return tuple(value)


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor."""
    return math.prod(shape)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _malformed(f"JSON: expected every key once, got {shown(twice)} {counts[twice]} times in one object")
    return result


def _malformed(message: str) -> ForwardError:
    return ForwardError(ErrorCode.MALFORMED_BODY, message)
