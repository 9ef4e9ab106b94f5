from __future__ import annotations

import pytest

from moe_forward.errors import ErrorCode
from moe_forward.wire.parameters import Parameters, collect, resolve


@pytest.fixture
def read(limits, make_request):
    def run(query=(), headers=None, body=None, typed=True):
        return resolve(collect(make_request(b"", query, headers), body or {}, typed), limits)

    return run


@pytest.mark.parametrize(
    "source",
    [
        {"query": [("layer", "3"), ("shared_experts", "false"), ("timeout_ms", "1500")]},
        {"headers": {"layer": "3", "shared_experts": "0", "timeout_ms": "1.5e3"}},
        {"headers": {"layer": " 3 ", "shared-experts": "False", "timeout-ms": "1500.0"}},
        {"headers": {"x-moe-layer": "3", "x-moe-shared_experts": "0", "x-moe-timeout_ms": "1500"}},
        {"headers": {"x-moe-layer": "3", "x-moe-shared-experts": "0", "x-moe-timeout-ms": "1500"}},
        {"body": {"layer": 3, "shared_experts": False, "timeout_ms": 1500}},
        {"body": {"layer": 3, "shared_experts": 0, "timeout_ms": 1500.0}},
        {"body": {"layer": "3", "shared_experts": "false", "timeout_ms": "1500"}, "typed": False},
    ],
)
def test_parameters_come_from_query_headers_or_body(source, read):
    assert read(**source) == Parameters(layer=3, shared_experts=False, timeout_seconds=1.5)


def test_only_the_layer_is_required(read):
    assert read([("layer", "4")]) == Parameters(layer=4, shared_experts=True, timeout_seconds=None)


def test_the_same_value_in_several_places_is_fine(read):
    given = read([("layer", "4"), ("shared_experts", "1")], {"x-moe-layer": "4", "layer": "04"}, {"layer": 4})
    assert given == Parameters(4, True, None)


@pytest.mark.parametrize(
    ("query", "headers", "body", "words"),
    [
        ([("layer", "4")], {"layer": "5"}, {}, ["layer", "4 in the query", "5 in the header layer"]),
        ([("layer", "4")], {}, {"layer": 5}, ["layer", "5 in the body"]),
        ([("layer", "4")], {"shared-experts": "1", "x-moe-shared_experts": "0"}, {}, ["shared_experts", "one value"]),
        ([("layer", "4"), ("layer", "4")], {}, {}, ["layer", "twice"]),
        ([("layer", "4"), ("Layer", "4")], {}, {}, ["query", "'Layer'"]),
        ([("layer", "4"), ("topk", "")], {}, {}, ["query", "'topk'"]),
        ([], {}, {}, ["layer", "none"]),
    ],
)
def test_contradicting_repeated_unknown_and_missing_parameters_are_refused(query, headers, body, words, read, refused):
    refused(ErrorCode.INVALID_PARAMETER, words, read, query, headers, body)


@pytest.mark.parametrize("value", ["", "x", "3.0", "0x3", "1e1", " 3", "+3", "1_0", "\u0663", "9" * 5000, "3,3"])
def test_a_layer_in_text_must_be_a_decimal_integer(value, read, refused):
    refused(ErrorCode.INVALID_PARAMETER, ["layer: expected an integer", "the query"], read, [("layer", value)])


@pytest.mark.parametrize("value", [None, "3", 3.0, True, [3], {"a": 3}, float("nan")])
def test_a_layer_in_json_must_be_an_integer(value, read, refused):
    refused(ErrorCode.INVALID_PARAMETER, ["layer: expected an integer", "the body"], read, (), None, {"layer": value})


@pytest.mark.parametrize("layer", [-1, 0, 2, 20, 10**30])
def test_a_layer_that_is_not_served_is_not_found_and_some_that_are_get_named(layer, read, refused):
    words = ["layer: expected one of the 17 served layers (3, 4, 5", "... 19)", str(layer)[:10]]
    refused(ErrorCode.LAYER_NOT_FOUND, words, read, (), None, {"layer": layer})


@pytest.mark.parametrize(("value", "typed"), [("yes", False), ("", False), (2, True), (1.0, True), ("true", True)])
def test_shared_experts_must_be_a_boolean(value, typed, read, refused):
    body = {"layer": 3 if typed else "3", "shared_experts": value}
    refused(ErrorCode.INVALID_PARAMETER, ["shared_experts: expected true"], read, (), None, body, typed)


@pytest.mark.parametrize("value", [0, -5, 60_000.5, 10**400, float("nan"), float("inf"), True, "5", None])
def test_a_timeout_in_json_must_be_positive_milliseconds_within_the_limit(value, read, refused):
    body = {"layer": 3, "timeout_ms": value}
    refused(ErrorCode.INVALID_PARAMETER, ["timeout_ms: expected a number in (0, 60000]"], read, (), None, body)


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "60001", "1e999", "1_0", "5ms", "0x5", "1" * 5000])
def test_a_timeout_in_text_must_be_positive_milliseconds_within_the_limit(value, read, refused):
    query = [("layer", "3"), ("timeout_ms", value)]
    refused(ErrorCode.INVALID_PARAMETER, ["timeout_ms: expected a number in (0, 60000]"], read, query)


def test_the_longest_timeout_is_accepted(read):
    assert read([("layer", "3"), ("timeout_ms", "60000")]).timeout_seconds == 60.0
