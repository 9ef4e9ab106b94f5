from __future__ import annotations

from moe_forward.api.heads import LONGEST_BYTES, MOST_HEADS, Head, Heads


def head(number: int) -> Head:
    return Head({"path": f"/{number}"}, number, True, False, {})


def test_a_head_is_found_by_its_exact_bytes() -> None:
    heads = Heads()
    heads.keep(b"POST /1", head(1))
    assert heads.find(b"POST /1") == head(1)
    assert heads.find(b"POST /1 ") is None


def test_a_long_head_is_not_kept() -> None:
    heads = Heads()
    heads.keep(b"x" * LONGEST_BYTES, head(1))
    heads.keep(b"x" * (LONGEST_BYTES + 1), head(2))
    assert heads.find(b"x" * LONGEST_BYTES) is not None
    assert heads.find(b"x" * (LONGEST_BYTES + 1)) is None


def test_heads_that_are_all_new_take_bounded_memory() -> None:
    heads = Heads()
    for number in range(3 * MOST_HEADS):
        heads.keep(b"%d" % number, head(number))
        assert heads.find(b"%d" % number) == head(number)
    assert sum(heads.find(b"%d" % number) is not None for number in range(3 * MOST_HEADS)) <= MOST_HEADS
