"""What a hostile recharge API does with one request: drawn by seed, pure.

Owns the bytes of an answer and when they come; must never do I/O, and knows nothing of
our client: HTTP as RFC 9110 and 9112 have it, and whatever breaks it.

The API is honest in what it means, and hostile in how it says it. An answer that can't
be read with certainty may be taken for unknown, or for what it means; for anything else
never. What belongs to another order stands behind an answer that has ended, so that
only a client which loses count of answers takes it for its own.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum, unique
from random import Random
from typing import Any, Final


@unique
class Meaning(StrEnum):
    """What the API says of the order, to whoever can read it."""

    EXECUTED = "executed"
    REFUSED = "refused"
    #: "Not executed, and not refused": too many requests, elsewhere, who are you.
    BUSY = "busy"
    #: An error that says nothing about the order, which was executed or not.
    UNSAID = "unsaid"


@unique
class Then(StrEnum):
    """What becomes of the connection."""

    KEEP = "keep"
    CLOSE = "close"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it goes over the wire."""

    #: Of the dressing, for the report.
    name: str
    #: Seconds of pause, and the bytes after it.
    pieces: tuple[tuple[float, bytes], ...]
    then: Then = Then.KEEP
    #: Sent when the head of the request was read, before its body.
    is_early: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """An answer's parts before they are dressed."""

    status: int
    body: bytes
    #: A whole answer that belongs to another order.
    foreign: bytes
    headers: tuple[tuple[str, str], ...] = field(
        default=(("Content-Type", "application/json"),)
    )

    def head(self, *more: tuple[str, str], line: str = "") -> bytes:
        """The status line and the header, up to the empty line."""
        lines = [line or f"HTTP/1.1 {self.status} X"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, *more)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def whole(self) -> bytes:
        """The answer as a good server sends it."""
        return self.head(("Content-Length", str(len(self.body)))) + self.body


#: Statuses by which a client may know that nothing was executed, or that it was.
_TELLING: Final = frozenset(
    {200, 201, 202, 301, 307, 308, 400, 401, 402, 403, 404, 422, 429}
)
_UNTELLING: Final = tuple(each for each in range(203, 600) if each not in _TELLING)
#: What servers and proxies say when they say nothing about the order.
_USUAL: Final = (302, 303, 408, 409, 425, 500, 502, 503, 504)
#: Such bodies have no content, whatever their header says (RFC 9110, 6.4.1).
_BODILESS: Final = frozenset({204, 205, 304})
_INTERIM: Final = (100, 102, 103, 110, 199)
#: Twenty million bytes in twenty thousand.
_BOMB: Final = zlib.compress(b" " * 20_000_000)
#: Longer than the deadline of a call in this instrument, in seconds.
_TOO_LATE_S: Final = 2.6


def draw_meaning(random: Random) -> tuple[Meaning, bool]:
    """What the API does with an order, and says: with whether it executes it."""
    meaning = random.choices(
        (Meaning.EXECUTED, Meaning.REFUSED, Meaning.BUSY, Meaning.UNSAID),
        (70, 15, 4, 11),
    )[0]
    is_executed = meaning is Meaning.EXECUTED or (
        meaning is Meaning.UNSAID and random.random() < 0.5  # noqa: PLR2004
    )
    return meaning, is_executed


def say(meaning: Meaning, reference: str, foreign: bytes, random: Random) -> Said:
    """The status and the body for a meaning."""
    document: dict[str, Any] = {}
    match meaning:
        case Meaning.EXECUTED:
            status, document = 201, {"status": "succeeded", "reference": reference}
        case Meaning.REFUSED:
            status = random.choice((400, 404, 422))
            document = {"error": {"code": "blocked", "message": "no"}}
        case Meaning.BUSY:
            status = random.choice((429, 429, 429, 301, 307, 308, 401, 402, 403))
            document = {"error": {"code": "busy"}}
        case Meaning.UNSAID:
            status = random.choice(random.choice((_UNTELLING, _USUAL)))
            document = random.choice(({}, {"error": {"code": "internal"}}))
    body = b"" if status in _BODILESS else json.dumps(document).encode()
    said = Said(status, body, foreign)
    if random.random() < 0.1:  # noqa: PLR2004
        place = random.choice(("http://[x", "/elsewhere", "http://127.0.0.1:9/", "\t"))
        said = replace(said, headers=(*said.headers, ("Location", place)))
    return said


def plain(said: Said) -> Answer:
    """As a good server says it."""
    return replace(_answer(said.whole()), name="plain")


def dress(said: Said, random: Random) -> Answer:
    """Choose how an answer is said."""
    names = list(_DRESSINGS)
    weights = [weight for weight, _ in _DRESSINGS.values()]
    name = random.choices(names, weights)[0]
    answer = _DRESSINGS[name][1](said, random)
    return replace(answer, name=name)


# -- The dressings -------------------------------------------------------------------


def _answer(*pieces: bytes, then: Then = Then.KEEP, pause_s: float = 0.0) -> Answer:
    first, *more = pieces
    return Answer("", ((0.0, first), *((pause_s, each) for each in more)), then)


def _plain(said: Said, _: Random) -> Answer:
    return _answer(said.whole())


def _interim(said: Said, random: Random) -> Answer:
    """RFC 9110, 15.2: any number of them may come before the final answer."""
    heads = [
        f"HTTP/1.1 {random.choice(_INTERIM)} X\r\n{_link(random)}\r\n".encode()
        for _ in range(random.choice((1, 1, 1, 2, 4)))
    ]
    pause_s = random.choice((0.01, 0.03, 0.1))
    way = random.choice(("at once", "after a pause", "after a pause", "one by one"))
    match way:
        case "at once":
            return _answer(b"".join(heads) + said.whole())
        case "after a pause":
            # A client that takes them for the final answer asks again meanwhile.
            return _answer(b"".join(heads), said.whole(), pause_s=pause_s)
        case _:
            return _answer(*heads, said.whole(), pause_s=pause_s)


def _link(random: Random) -> str:
    return random.choice(("", "Link: </a>; rel=preload\r\n"))


def _switching(said: Said, _: Random) -> Answer:
    head = b"HTTP/1.1 101 X\r\nUpgrade: other\r\nConnection: upgrade\r\n\r\n"
    return _answer(head + said.whole())


def _split(said: Said, random: Random) -> Answer:
    whole = said.whole()
    step = random.choice((1, 2, 7, 31))
    pieces = [whole[start : start + step] for start in range(0, len(whole), step)]
    return _answer(*pieces, pause_s=random.choice((0.0, 0.0004)))


def _chunked_body(body: bytes, random: Random, trailer: bytes = b"") -> bytes:
    cut = random.randint(1, max(1, len(body) - 1))
    parts = [each for each in (body[:cut], body[cut:]) if each]
    extension = random.choice((b"", b";a=b", b' ; a="b"'))
    chunks = [b"%x%s\r\n%s\r\n" % (len(p), extension, p) for p in parts]
    return b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"


def _chunks(said: Said, random: Random) -> Answer:
    trailer = random.choice((b"", b"A: b\r\n", b"Content-Length: 1\r\n"))
    head = said.head(("Transfer-Encoding", "chunked"))
    return _answer(head + _chunked_body(said.body, random, trailer))


def _bad_chunks(said: Said, random: Random) -> Answer:
    size = random.choice((b"-1", b"+5", b"0x5", b"5_0", b"", b"zz", b"ffffffffffff"))
    head = said.head(("Transfer-Encoding", "chunked"))
    return _answer(
        head + size + b"\r\n" + said.body + b"\r\n0\r\n\r\n", then=Then.CLOSE
    )


def _unended_chunks(said: Said, random: Random) -> Answer:
    whole = said.head(("Transfer-Encoding", "chunked"))
    whole += _chunked_body(said.body, random)
    return _answer(whole[: -random.randint(1, 5)], then=Then.CLOSE)


def _wrong_length(said: Said, random: Random) -> Answer:
    length = len(said.body)
    values = random.choice(
        (
            (f"-{length}",),
            (f"+{length}",),
            (f"{length}, {length}",),
            (f"{length}", f"{length}"),
            (f"{length}", "0"),
            ("0", f"{length}"),
            (hex(length),),
            (f"{length + 7}",),
            ("99999999999999999999",),
            ("",),
        )
    )
    head = said.head(*(("Content-Length", value) for value in values))
    return _answer(head + said.body, then=Then.CLOSE)


def _short_length(said: Said, random: Random) -> Answer:
    """What is behind the length is a whole answer of another order."""
    cut = random.randint(0, len(said.body))
    head = said.head(("Content-Length", str(cut)))
    return _answer(head + said.body[:cut] + said.foreign)


def _length_and_chunks(said: Said, random: Random) -> Answer:
    """RFC 9112, 6.3: it may be a smuggled answer."""
    body = _chunked_body(said.body, random)
    both = [("Content-Length", str(len(body))), ("Transfer-Encoding", "chunked")]
    random.shuffle(both)
    return _answer(said.head(*both) + body + random.choice((b"", said.foreign)))


def _other_coding(said: Said, random: Random) -> Answer:
    coding = random.choice(
        ("gzip, chunked", "identity", "chunked, chunked", "xchunked")
    )
    body = _chunked_body(said.body, random)
    return _answer(said.head(("Transfer-Encoding", coding)) + body, then=Then.CLOSE)


def _two_answers(said: Said, random: Random) -> Answer:
    second = random.choice((said.whole(), said.foreign))
    return _answer(said.whole() + second)


def _late_answer(said: Said, random: Random) -> Answer:
    second = random.choice((said.whole(), said.foreign, b"\r\n", b"HTTP/1.1 408 X\r\n"))
    return _answer(said.whole(), second, pause_s=random.choice((0.001, 0.02, 0.2)))


def _empty_then_answer(said: Said, random: Random) -> Answer:
    """A bodiless status with a body behind it, which is the next answer."""
    status = random.choice((204, 304))
    bodiless = replace(said, status=status).head(("Content-Length", "0"))
    return _answer(bodiless + said.whole())


def _until_close(said: Said, random: Random) -> Answer:
    head = said.head(*random.choice(((), (("Connection", "close"),))))
    return _answer(head + said.body, then=Then.CLOSE)


def _cut(said: Said, random: Random) -> Answer:
    whole = said.whole()
    cut = random.randint(0, len(whole) - 1)
    return _answer(whole[:cut] or b"", then=random.choice((Then.CLOSE, Then.RESET)))


def _version(said: Said, random: Random) -> Answer:
    status = said.status
    line = random.choice(
        (
            f"HTTP/1.0 {status} X",
            f"HTTP/1.1 {status}",
            f"HTTP/2 {status} X",
            f"HTTP/1.1 {status}0 X",
            f"HTTP/1.1 0{status} X",
            "HTTP/1.1 99 X",
            f"HTTP/1.1  {status} X",
            f"http/1.1 {status} X",
            f"ICY {status} X",
            "\r\n",
        )
    )
    head = said.head(("Content-Length", str(len(said.body))), line=line)
    return _answer(head + said.body, then=random.choice((Then.KEEP, Then.CLOSE)))


def _odd_head(said: Said, random: Random) -> Answer:
    more: tuple[tuple[str, str], ...] = random.choice(
        (
            (("A", "x" * 60_000),),
            (("A", "x" * 70_000),),
            tuple((f"A{number}", "x") for number in range(99)),
            tuple((f"A{number}", "x") for number in range(500)),
            (("A", "b\r\n c"),),
            (("No-Colon\r\nA", "b"),),
            (("A", "\x00"),),
            (("", "x"),),
            (("Retry-After", random.choice(("-1", "1e9", "x", "Thu, 01 Jan 1970"))),),
            (("Connection", "close, keep-alive"),),
            (("Set-Cookie", "a=b; Domain=127.0.0.1"),),
        )
    )
    head = said.head(*more, ("Content-Length", str(len(said.body))))
    return _answer(head + said.body, then=random.choice((Then.KEEP, Then.CLOSE)))


def _odd_body(said: Said, random: Random) -> Answer:
    body = random.choice(
        (
            said.body + b" " * 200_000,
            b" " * 70_000 + said.body,
            b"\xef\xbb\xbf" + said.body,
            b"[" * 5_000,
            b"<html>" + said.body,
            b"{}" * 30_000,
            said.body + said.body,
        )
    )
    return _plain(replace(said, body=body), random)


def _encoded(said: Said, random: Random) -> Answer:
    packed = zlib.compress(said.body)
    body = random.choice((packed, said.body, packed[:-3], _BOMB))
    coding = random.choice(("deflate", "gzip", "br", "unknown"))
    headers = (*said.headers, ("Content-Encoding", coding))
    return _plain(replace(said, body=body, headers=headers), random)


def _drip(said: Said, _: Random) -> Answer:
    whole = said.whole()
    step = max(1, len(whole) // 20)
    pieces = [whole[start : start + step] for start in range(0, len(whole), step)]
    return _answer(*pieces, pause_s=_TOO_LATE_S / 15)


def _too_late(said: Said, random: Random) -> Answer:
    started = said.whole()
    begun = random.choice((0, 10))
    return _answer(started[:begun], started[begun:], pause_s=_TOO_LATE_S)


def _early(said: Said, _: Random) -> Answer:
    """Before the request's body was read, as a proxy refuses (RFC 9112, 9.5)."""
    return replace(_answer(said.whole()), is_early=True)


#: Name -> how often, and the dressing.
_DRESSINGS: Final[dict[str, tuple[int, Callable[[Said, Random], Answer]]]] = {
    "plain": (30, _plain),
    "interim answers": (40, _interim),
    "101": (2, _switching),
    "split": (8, _split),
    "chunks": (8, _chunks),
    "bad chunks": (3, _bad_chunks),
    "unended chunks": (3, _unended_chunks),
    "wrong length": (6, _wrong_length),
    "short length": (5, _short_length),
    "length and chunks": (4, _length_and_chunks),
    "other coding": (2, _other_coding),
    "two answers": (8, _two_answers),
    "late answer": (8, _late_answer),
    "empty, then the answer": (4, _empty_then_answer),
    "until the end": (6, _until_close),
    "cut": (5, _cut),
    "status line": (5, _version),
    "odd head": (6, _odd_head),
    "odd body": (4, _odd_body),
    "encoded": (3, _encoded),
    "drip": (1, _drip),
    "too late": (1, _too_late),
    "before the body": (3, _early),
}
DRESSINGS: Final = tuple(_DRESSINGS)
