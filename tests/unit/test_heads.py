"""How much of a request's head is kept, whatever a record makes of it."""

from collections.abc import Callable

import pytest

from function.heads import (
    FIELD_BYTES_MAX,
    FIELDS_KEPT_MAX,
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    is_liveness_probe,
    read_head,
)

BODY = b"Content-Length: 3\r\nCE-Id: 7\r\n\r\nabcPOST / HTTP/1.1\r\n"


def reader(data: bytes, size: int) -> Callable[[], bytes]:
    pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def wire(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in (b"POST / HTTP/1.1", *lines)) + BODY


MANY = [b"h%d: x" % number for number in range(FIELDS_MAX + 1)]
LONG = b"h: " + b"x" * FIELD_BYTES_MAX
LARGE = [b"h%d: %s" % (n, b"x" * 1000) for n in range(HEAD_BYTES_MAX // 1000 + 9)]


@pytest.mark.parametrize("size", [1, 7, 8192, 10**9])
@pytest.mark.parametrize(
    "data", [wire(), wire(b"a: b"), wire(*MANY[3:]), b"\r\n" + wire()], ids=range(4)
)
def test_head_within_bounds_is_left_as_it_came(data: bytes, size: int) -> None:
    read = reader(data, size)

    head, dropped = read_head(read)

    assert data.startswith(head)
    assert head + b"".join(iter(read, b"")) == data
    assert not dropped


@pytest.mark.parametrize("size", [13, 8192, 10**9])
@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (MANY, "more than 500 fields"),
        (MANY * 40, "more than 500 fields"),
        ([LONG], "a field of more than"),
        ([b"x" * 200_000], "a field of more than"),
        ([b"ce-source: " + b"x" * 99_000], "a field of more than"),
        ([b"ce-source: x"] * 900, "more than 500 fields"),
        (LARGE, "larger than"),
    ],
    ids=range(7),
)
def test_what_is_beyond_is_dropped_and_said(
    lines: list[bytes], told: str, size: int
) -> None:
    data = wire(*lines)
    read = reader(data, size)

    head, dropped = read_head(read)

    assert dropped.startswith("head: ")
    assert told in dropped
    kept, _, behind = head.partition(b"\r\n\r\n")
    # The server takes it, and finds the body and what follows it.
    request, *fields = kept.split(b"\r\n")
    assert request == b"POST / HTTP/1.1"
    assert len(fields) <= FIELDS_KEPT_MAX
    assert all(b":" in field and len(field) <= FIELD_BYTES_MAX for field in fields)
    assert fields[-2:] == [b"Content-Length: 3", b"CE-Id: 7"]
    assert behind + b"".join(iter(read, b"")) == b"abcPOST / HTTP/1.1\r\n"


@pytest.mark.parametrize(
    "data",
    [b"", b"POST / HTT", b"x" * 90_000, b"a\nb\n" * 9, b"\r\n" * 9_000, wire()[:-40]],
    ids=range(6),
)
def test_what_is_no_head_is_left_to_the_server(data: bytes) -> None:
    head, dropped = read_head(reader(data, 100))

    assert data.startswith(head)
    assert not dropped


@pytest.mark.parametrize(
    ("data", "is_one"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (b"GET /healthz HTTP/1.0\r\n\r\n", True),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", False),
        (b"GET /healthz HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n", False),
        (b"POST /healthz HTTP/1.1\r\n\r\n", False),
        (b"GET /healthzz HTTP/1.1\r\n\r\n", False),
        (b"", False),
    ],
)
def test_probe_is_told_from_all_else(data: bytes, *, is_one: bool) -> None:
    assert is_liveness_probe(data) == is_one
