"""Cutting a byte stream into JSON texts, however it is cut by the socket."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ublk_ubi.framing import MAX_DEPTH, Framer, FramingError

LIMIT = 4096
KEYS = st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


def take(framer: Framer) -> list[bytes]:
    found = []
    while (text := framer.next()) is not None:
        found.append(text)
    return found


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["", " ", "\n", "\r\n\t "]),
    st.integers(1, 17),
    st.booleans(),
)
def test_any_cut_gives_the_same_texts(values, between: str, step: int, ascii_only: bool) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only).encode() for value in values]
    stream = between.encode() + between.encode().join(texts) + between.encode()
    framer = Framer(1 << 20)
    found = []
    for at in range(0, len(stream), step):
        framer.feed(stream[at : at + step])
        found += take(framer)
    assert found == texts
    assert not framer.partial


@pytest.mark.parametrize("stream", [b"}", b"]", b"x", b"1", b'"a"', b"\0", b"\xff", b"{}x"])
def test_what_begins_no_text(stream: bytes) -> None:
    framer = Framer(LIMIT)
    framer.feed(stream)
    with pytest.raises(FramingError, match="not a JSON object"):
        take(framer)


def test_brackets_in_strings_do_not_count() -> None:
    framer = Framer(LIMIT)
    text = rb'{"a":"}]\"}{[\\","b":["{"]}'
    framer.feed(text + b"{}")
    assert take(framer) == [text, b"{}"]


def test_depth_is_bounded() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert len(take(framer)) == 1
    framer.feed(b"[" * (MAX_DEPTH + 1))
    with pytest.raises(FramingError, match="nested deeper"):
        framer.next()


def test_size_is_bounded_exactly() -> None:
    framer = Framer(LIMIT)
    largest = b'{"a":"' + b"x" * (LIMIT - 8) + b'"}'
    assert len(largest) == LIMIT
    framer.feed(largest)
    assert framer.room == 0
    assert take(framer) == [largest]
    framer.feed(largest[:-1] + b" ")
    with pytest.raises(FramingError, match="larger than 4096 bytes"):
        framer.next()


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 20))
def test_garbage_never_gives_another_error(stream: bytes, step: int) -> None:
    framer = Framer(LIMIT)
    try:
        for at in range(0, len(stream), step):
            framer.feed(stream[at : at + step])
            take(framer)
    except FramingError:
        pass
