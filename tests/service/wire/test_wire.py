from __future__ import annotations

import pytest

from moe_forward.errors import ErrorCode
from moe_forward.wire import ENCODINGS, OIP, for_content_type, oip, plain_json, safetensors


@pytest.mark.parametrize(
    ("content_type", "encoding"),
    [
        ("application/json", plain_json),
        ("application/json; charset=utf-8", plain_json),
        (" Application/JSON ;charset=utf-8", plain_json),
        ("application/vnd.safetensors", safetensors),
        ("APPLICATION/VND.SAFETENSORS", safetensors),
    ],
)
def test_the_content_type_chooses_the_encoding(content_type, encoding):
    assert for_content_type(content_type) is encoding


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/octet-stream", "json", "\ud800"])
def test_an_unknown_content_type_is_refused_with_the_accepted_ones(content_type, refused):
    words = ["content-type", "application/json", "application/vnd.safetensors"]
    refused(ErrorCode.UNSUPPORTED_MEDIA_TYPE, words, for_content_type, content_type)


def test_encodings_have_distinct_names_for_metrics():
    assert [encoding.name for encoding in (*ENCODINGS.values(), OIP)] == ["safetensors", "json", "oip"]
    assert OIP is oip


@pytest.mark.parametrize("encoding", [*ENCODINGS.values(), OIP])
def test_every_encoding_refuses_a_compressed_body(encoding, make_request, limits, refused):
    request = make_request(b"\x1f\x8b", headers={"content-encoding": "gzip"})
    refused(ErrorCode.UNSUPPORTED_MEDIA_TYPE, ["'gzip'"], encoding.decode, request, limits)
