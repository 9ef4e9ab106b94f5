"""The client's trace: what counts as a traceparent (W3C Trace Context), and what does not."""

from __future__ import annotations

import pytest

from moe_forward.tracing import TraceContext, trace_context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def of(*parents: str, state: tuple[str, ...] = ()) -> TraceContext | None:
    headers = [(b"host", b"x"), *((b"traceparent", parent.encode("latin-1")) for parent in parents)]
    return trace_context(headers + [(b"tracestate", part.encode("latin-1")) for part in state])


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True), ("03", True), ("02", False)])
def test_a_traceparent_names_trace_span_and_whether_it_is_kept(flags: str, sampled: bool) -> None:
    assert of(f"00-{TRACE}-{SPAN}-{flags}") == TraceContext(TRACE, SPAN, sampled)


def test_a_later_version_may_say_more_and_this_one_may_not() -> None:
    assert of(f"cc-{TRACE}-{SPAN}-01-what.it.will.be") == TraceContext(TRACE, SPAN, True)
    assert of(f"00-{TRACE}-{SPAN}-01-more") is None
    assert of(f"cc-{TRACE}-{SPAN}-01.more") is None


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-0\xe9",
    ],
)
def test_what_is_not_well_formed_counts_as_none(parent: str) -> None:
    assert of(parent) is None


def test_two_parents_count_as_none() -> None:
    assert of(f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01") is None
    assert of() is None


def test_the_state_of_several_headers_is_one_list() -> None:
    found = of(f"00-{TRACE}-{SPAN}-01", state=("a=1,b=2", "c=3"))
    assert found is not None
    assert found.state == "a=1,b=2,c=3"
