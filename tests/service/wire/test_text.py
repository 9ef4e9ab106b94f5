from __future__ import annotations

import pytest

from moe_forward.errors import ErrorCode
from moe_forward.wire.text import parse_object, parse_shape, shown


def parse(text: bytes) -> dict[str, object]:
    return parse_object(memoryview(text), "body")


def test_an_object_is_parsed_with_its_types():
    assert parse(b' {"a": [1, 2.5, "x", true, null]} ') == {"a": [1, 2.5, "x", True, None]}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "expecting value at character 0"),
        (b"[1]", "expected a JSON object, got [1]"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": 1} x', "extra data"),
        (b'\xff\xfe{"a": 1}', "byte 0 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "bom"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' 2 times"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001, "nested too deeply"),
    ],
)
def test_text_that_is_no_plain_object_is_malformed(text, word, refused):
    refused(ErrorCode.MALFORMED_BODY, ["body" if "times" not in word else "JSON", word], parse, text)


def test_an_integer_of_many_digits_is_parsed_or_malformed_but_never_slow(refused):
    refused(ErrorCode.MALFORMED_BODY, ["sane length"], parse, b'{"a": ' + b"9" * 100_000 + b"}")


def test_many_repeated_keys_are_refused_in_linear_time(refused):
    pairs = ",".join(f'"{key}": 0' for key in range(60_000))
    refused(ErrorCode.MALFORMED_BODY, ["'59999'"], parse, f'{{{pairs},"59999": 1}}'.encode())


def test_a_shape_is_a_tuple_of_sizes():
    assert parse_shape("x", [0, 7, 1 << 39]) == (0, 7, 1 << 39)
    assert parse_shape("x", []) == ()


@pytest.mark.parametrize(
    "shape", [None, "3", 3, [-1], [True], [2.0], ["2"], [None], [1 << 40], [10**30], [1] * 9, [[1]]]
)
def test_a_shape_of_anything_but_sizes_is_malformed(shape, refused):
    refused(ErrorCode.MALFORMED_BODY, ["x: expected shape"], parse_shape, "x", shape)


def test_a_shown_value_is_short_and_printable():
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        deep,
        "x" * 10_000,
        ["y" * 1000] * 1000,
        {str(i): [i] * 9 for i in range(1000)},
        "\ud800\n",
        10**4000,
    ):
        text = shown(value)
        assert len(text) <= 160
        assert text.encode().decode() == text
        assert "\n" not in text
    assert shown("a") == "'a'"
    while deep:  # take it apart in a loop, so that freeing it does not recurse
        deep = deep.pop()
