"""Requests that nobody should send, with good orders between them, as Hypothesis draws.

Owns the strategies, and what each request is: how its body is framed, and whether it
holds an order that must be executed. Must never send anything, nor draw an identity:
every request that is made is new to the ledger, also when a find is replayed.
"""

import base64
import gzip
import itertools
import json
import zlib
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from hypothesis import strategies as st

#: Stands in every order and in many a header, and in no answer and no log line.
MARK: Final = "Zq7731xW"
#: Every number begins so, and six digits follow.
NUMBER_PREFIX: Final = "+41790"
#: Whoever posts may name an event so; it stands in every one.
_SECRET: Final = f"{MARK} {NUMBER_PREFIX}000000"
#: Its pause has these words, which are for nobody who posts.
PAUSED_CHANNEL: Final = "paused-kiosk"
PAUSE_REASON: Final = f"{MARK} ask {NUMBER_PREFIX}000000"
#: The orders for which proof/planted_error.py makes the function fail, and how.
PLANTED_PREFIX: Final = "planted-"
PLANTED_ERROR: Final = "PlantedError"
#: EVENT_BYTES_MAX, at its default.
EVENT_BYTES_MAX: Final = 256 * 1024
EVENT_TYPE: Final = "com.example.topup.requested.v1"
_SOURCE: Final = "/apis/v1/namespaces/shop/kafkasources/source#recharge.orders"
_STRUCTURED: Final = "application/cloudevents+json"
#: Longer than the function waits for the next piece of a body.
STALL_S: Final = 1.2
_DRIP_S: Final = 0.02
_SHOWN_BYTES: Final = 700
_NUMBERS_MAX: Final = 999_999

#: All of one width: what is drawn may not depend on how many were drawn before.
_numbers: Final = itertools.count(100_000)

Ending = Literal["keep", "end", "vanish"]
Order = dict[str, Any]
Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Request:
    """What is sent as one request."""

    kind: str
    #: A pause of `pause_s` stands between them.
    pieces: tuple[bytes, ...]
    method: bytes = b"POST"
    #: What a server must take for its body; None: it can't know, and may only ask for
    #: the request again, and close.
    body: bytes | None = None
    #: The order that it holds and that must be executed.
    order: Order | None = None
    #: Whether a server may find its head unreadable.
    is_odd: bool = False
    #: Whether the function is made to fail.
    is_planted: bool = False
    #: Whether it would swallow what follows on its connection.
    is_last: bool = False
    pause_s: float = _DRIP_S

    @property
    def key(self) -> str:
        """The idempotency key of its order; empty if it holds none."""
        return key_of(self.order) if self.order else ""

    def __repr__(self) -> str:
        """Short enough for a person to read, for the account of a find."""
        wire = b"".join(self.pieces)
        dots = "..." if len(wire) > _SHOWN_BYTES else ""
        shown = f"{wire[:_SHOWN_BYTES]!r}{dots}"
        return f"{self.kind}, {len(wire)} bytes in {len(self.pieces)} pieces: {shown}"


@dataclass(frozen=True)
class Exchange:
    """What happens on one connection."""

    requests: tuple[Request, ...]
    #: Whether all is sent before anything is read.
    is_pipelined: bool
    #: How the client ends: it goes on, says that it has sent all, or is killed.
    ending: Ending


def key_of(order: Order) -> str:
    """The order's idempotency key."""
    return f"{order['channel']}:{order['rechargeId']}"


def new_order(prefix: str = "r-") -> Order:
    """An order that was never sent, of a subscriber who never ordered.

    Raises:
        OverflowError: there are no more numbers.

    """
    number = next(_numbers)
    if number > _NUMBERS_MAX:
        raise OverflowError("a run has 900,000 numbers at most")
    return {
        "rechargeId": f"{prefix}{number}",
        "channel": "app",
        "msisdn": f"{NUMBER_PREFIX}{number}",
        "amountMinor": 500,
        "currency": "CHF",
        "requestedAt": "2026-01-02T03:04:05Z",
        "note": MARK,
    }


def delivery_of(order: Order, kind: str = "redelivery") -> Request:
    """An order as a KafkaSource delivers it."""
    body = json.dumps(order).encode()
    return _request(kind, _plain_headers(), body, order=order)


def heaviest_orders() -> list[Request]:
    """Good orders as large as they may be, of what takes the most memory once read.

    The function takes at most 10,000 values in an event (docs/EVENTS.md).
    """
    room = EVENT_BYTES_MAX - 1_000
    heavy: tuple[object, ...] = (
        [[{"": []}]] * 1_900,
        [[]] * 4_900,
        [f"{number:024}" for number in range(9_000)],
        {f"{number:020}": "" for number in range(4_900)},
        "\U0001f600" + "x" * (room - 20),
        [number / 7 for number in range(9_900)],
    )
    made = []
    for value in heavy:
        order = new_order() | {"metadata": {"a": value}}
        body = json.dumps(order, ensure_ascii=False).encode()
        if len(body) > EVENT_BYTES_MAX:
            raise AssertionError(f"too large to be an order: {len(body)} bytes")
        made.append(_request("heavy order", _plain_headers(), body, order=order))
    return made


def too_heavy_events() -> list[Request]:
    """As large as an order may be, of as many values as there is room for."""
    made = []
    for value in ("[[]]", '[{"":[]}]', "{}"):
        order = json.dumps(new_order() | {"metadata": {"a": "@"}})
        room = EVENT_BYTES_MAX - len(order)
        values = ",".join([value] * (room // (len(value) + 1) - 2))
        body = order.replace('"@"', f"[{values}]").encode()
        made.append(_request("too heavy event", _plain_headers(), body))
    return made


# ---- how a request is written --------------------------------------------------------


def _head(
    headers: Headers,
    *,
    method: bytes = b"POST",
    target: bytes = b"/",
    version: bytes = b"HTTP/1.1",
    host: bytes = b"function",
) -> bytes:
    lines = [method + b" " + target + b" " + version, b"Host: " + host]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _length(body: bytes) -> Headers:
    return ((b"Content-Length", str(len(body)).encode()),)


def _request(
    kind: str, headers: Headers, body: bytes, order: Order | None = None
) -> Request:
    wire = _head(headers + _length(body)) + body
    return Request(kind, (wire,), body=body, order=order)


def _plain_headers() -> Headers:
    """Of a plain record, as a KafkaSource makes them; the key is the number."""
    offset = next(_numbers)
    fields = {
        "ce-specversion": "1.0",
        "ce-id": f"partition:0/offset:{offset} {_SECRET}",
        "ce-source": _SOURCE,
        "ce-type": "dev.knative.kafka.event",
        "ce-subject": f"partition:0#{offset}",
        "ce-time": "2026-11-23T10:02:00.123Z",
        "ce-key": f"{NUMBER_PREFIX}000000",
        "ce-kafkaheaderx": MARK,
        "ce-knativekafkapartition": "0",
        "ce-knativekafkaoffset": f"{offset}",
        "prefer": "reply",
    }
    return tuple((name.encode(), value.encode()) for name, value in fields.items())


def _binary_headers() -> Headers:
    """Of an event of our own type, as a producer makes them."""
    changed = {
        b"ce-source": b"/app",
        b"ce-type": EVENT_TYPE.encode(),
        b"ce-topic": b"recharge.orders",
    }
    fields = dict(_plain_headers()) | changed | {b"Content-Type": b"application/json"}
    return tuple(fields.items())


def _structured_headers() -> Headers:
    return ((b"Content-Type", _STRUCTURED.encode()),)


def _event(data: object = None, **changes: object) -> dict[str, Any]:
    """An event in structured mode."""
    document = {
        "specversion": "1.0",
        "id": f"e-{next(_numbers)} {_SECRET}",
        "source": "/shop",
        "type": EVENT_TYPE,
        "data": new_order() if data is None else data,
    }
    return document | changes


def _chunks(body: bytes, size: int, extension: bytes = b"") -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(
        b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces
    )


# ---- good orders ---------------------------------------------------------------------

_TARGETS: Final = (
    b"/", b"//", b"///x//y", b"/a/../..", b"/%00", b"/%2e%2e/", b"/?a=b", b"/healthz",
    b"/readyz", b"/robots.txt", b"/favicon.ico", b"/%ff", b"http://elsewhere/x",
    b"http://elsewhere//", b"/" + b"x" * 7000, b"/\\x", b"/;x", b"/a//b#c",
)  # fmt: skip
_HOSTS: Final = (
    b"f", b"", b"..", b"a..b", b"x" * 300, b"\xe4", b"\xff\xfe", b"a b", b"[::1",
    b"a:99999999", b"xn--a", b"a/b", b"a,b", b"@",
)  # fmt: skip
_HARMLESS: Final[tuple[Headers, ...]] = (
    (),
    ((b"ce-kafkaheadery", b"caf\xe9 \xff"),),
    ((b"ce-kafkaheadery", "caf\u00e9 \u4e2d".encode()),),
    ((b"ce-kafkaheadery", b"one"), (b"ce-kafkaheadery", b"two")),
    ((b"ce-kafkaheadery", b"x" * 30_000),),
    tuple((b"ce-kafkaheader%d" % number, b"x") for number in range(450)),
    ((b"Expect", b"100-continue"),),
    ((b"Connection", b"close"),),
    ((b"Accept-Encoding", b"gzip;q=0, *"),),
    ((b"X-Forwarded-Host", b".."), (b"Forwarded", b'for="_x";host=".."')),
    ((b"Upgrade", b"h2c"), (b"Connection", b"Upgrade"), (b"HTTP2-Settings", b"AAMA")),
)


@st.composite
def _good_orders(draw: st.DrawFn) -> Request:
    """An order in every way in which one may come."""
    order = new_order()
    text = json.dumps(order, ensure_ascii=draw(st.booleans()))
    mode = draw(st.sampled_from(["plain", "binary", "structured", "base64"]))
    body, headers = text.encode(), _plain_headers()
    if mode == "binary":
        headers = _binary_headers()
    elif mode == "structured":
        headers, body = _structured_headers(), json.dumps(_event(order)).encode()
    elif mode == "base64":
        event = _event(data_base64=base64.b64encode(body).decode())
        event.pop("data")
        headers, body = _structured_headers(), json.dumps(event).encode()
    headers += draw(st.sampled_from(_HARMLESS))
    frame = draw(st.sampled_from(["length", "length", "chunks", "trailers", "old"]))
    version, framed, framing = b"HTTP/1.1", body, _length(body)
    if frame == "old":
        version = b"HTTP/1.0"
    elif frame != "length":
        framing = (
            (b"Transfer-Encoding", draw(st.sampled_from([b"chunked", b"CHUNKED"]))),
        )
        extension = draw(st.sampled_from([b"", b";a=b", b" ; a", b';a="b;c"']))
        end = b"0\r\nX-Trailer: " + MARK.encode() + b"\r\n\r\n"
        framed = _chunks(body, draw(st.sampled_from([1, 7, 100, 8192])), extension)
        framed += end if frame == "trailers" else b"0\r\n\r\n"
    wire = _head(
        headers + framing,
        target=draw(st.sampled_from(_TARGETS)),
        version=version,
        host=draw(st.sampled_from(_HOSTS)),
    )
    pieces = _cut(wire + framed, draw(st.lists(st.floats(0, 1), max_size=4)))
    return Request(f"good order, {mode}, {frame}", pieces, body=body, order=order)


def _cut(wire: bytes, places: list[float]) -> tuple[bytes, ...]:
    cuts = sorted({round(place * len(wire)) for place in places} | {0, len(wire)})
    return tuple(wire[start:end] for start, end in itertools.pairwise(cuts))


def _planted_error() -> Request:
    """An order at which the function fails as nobody foresaw."""
    request = delivery_of(new_order(PLANTED_PREFIX), "planted error")
    return replace(request, order=None, is_planted=True)


# ---- bodies --------------------------------------------------------------------------

_SCALARS: Final = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**30, -(2**63), 2**64, 1e400, "\ud800", "\u0000", MARK * 99])
)
_JSON: Final = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
    ),
    max_leaves=12,
)
_FIELDS: Final = (
    "rechargeId", "channel", "msisdn", "amountMinor", "currency", "requestedAt",
    "donorMsisdn", "note",
)  # fmt: skip
_ODD_VALUES: Final[tuple[object, ...]] = (
    None, True, -1, 0, 1.0, 10**12, 10**40, "", " ", MARK, [], {}, [MARK], "\ud800",
    "a\u0000b", "\u202e", "x" * 129, "chf", "XXX", "+41", "+" + "9" * 15,
    "0041790000000", "2026-13-45", "2026-01-02T03:04:05",
)  # fmt: skip
_NUMBERS_AS_TEXT: Final = (
    "5.0", "5e2", "-0", "05", "NaN", "Infinity", "-Infinity", "1e999", "0x5", "5_0",
    "1" * 5001, "5,0", "\u0665", '"500"', "true",
)  # fmt: skip


def _told(name: str, value: object) -> object:
    """The value, unless the log may tell it: a key is no secret, nor a short id."""
    may_be_told = name in {"rechargeId", "channel"} or value == MARK
    return "odd" if may_be_told and MARK in str(value) else value


@st.composite
def _bent_orders(draw: st.DrawFn) -> bytes:
    """An order with one thing wrong."""
    order = new_order()
    good = json.dumps(order).encode()
    match draw(
        st.sampled_from(["field", "field", "missing", "number", "twice", "cut"])
    ):
        case "field":
            name = draw(st.sampled_from(_FIELDS))
            order[name] = _told(name, draw(st.sampled_from(_ODD_VALUES) | _JSON))
            return json.dumps(order).encode()
        case "missing":
            order.pop(draw(st.sampled_from(_FIELDS[:6])))
            return json.dumps(order).encode()
        case "number":
            written = draw(st.sampled_from(_NUMBERS_AS_TEXT)).encode()
            return good.replace(b": 500,", b": " + written + b",")
        case "twice":
            name = draw(st.sampled_from(_FIELDS))
            return good[:-1] + f', "{name}": "{MARK}"}}'.encode()
        case _:
            return good[: draw(st.integers(1, len(good) - 1))]


@st.composite
def _bent_documents(draw: st.DrawFn) -> bytes:
    """What is hardly an order."""
    good = json.dumps(new_order()).encode()
    bend = draw(
        st.sampled_from(["text", "deep", "encoded", "large", "json", "bytes", "empty"])
    )
    match bend:
        case "text":
            return draw(st.sampled_from(_bent_texts(good)))
        case "deep":
            depth = draw(st.sampled_from([5, 30, 31, 32, 33, 1000, 100_000]))
            return _deep(good, depth, is_list=draw(st.booleans()))
        case "encoded":
            return draw(st.sampled_from(_encoded(good)))
        case "large":
            beyond = draw(st.sampled_from([-1, 0, 1, 40_000, 1_500_000]))
            filling = b"y" * (EVENT_BYTES_MAX + beyond - len(good) - 7)
            return good[:-1] + b',"x":"' + filling + b'"}'
        case "json":
            return json.dumps(draw(_JSON)).encode()
        case "bytes":
            return draw(st.binary(max_size=200))
        case _:
            return draw(st.sampled_from([b"", b" ", b"\r\n", b"null", b"{}", b"[]"]))


def _bent_texts(good: bytes) -> list[bytes]:
    return [
        good + good,
        good + b"\0",
        b"[" + good + b"]",
        good[:-1] + b",}",
        b"/* c */" + good,
        good.replace(b'"', b"'"),
        good.replace(b'"app"', b'"\\ud800"'),
        good.replace(b'"app"', b'"\\ud83d\\ude00"'),
        good.replace(b'"app"', b'"\xed\xa0\x80"'),
        good.replace(b'"app"', b'"\xc0\xaf"'),
        good.replace(b'"app"', b'"a\nb"'),
        good.replace(b'"app"', b'"\\u0000"'),
        good.replace(b'"note"', b'"__proto__"'),
        good.replace(b'"note"', b'""'),
    ]


def _deep(good: bytes, depth: int, *, is_list: bool) -> bytes:
    opening, closing = (b"[", b"]") if is_list else (b'{"a":', b"}")
    return good[:-1] + b',"x":' + opening * depth + b"1" + closing * depth + b"}"


def _encoded(good: bytes) -> list[bytes]:
    text = good.decode()
    return [
        b"\xef\xbb\xbf" + good,
        text.encode("utf-16"),
        text.encode("utf-16-be"),
        text.encode("utf-32"),
        text.replace("app", "caf\u00e9").encode("latin-1"),
        gzip.compress(good, mtime=0),
        zlib.compress(good),
        base64.b64encode(good),
        good.replace(b" ", b"\xc2\xa0"),
    ]


@st.composite
def _requests_with_bent_body(draw: st.DrawFn) -> Request:
    body = draw(_bent_orders() | _bent_documents())
    headers = draw(st.sampled_from([_plain_headers, _binary_headers]))()
    if draw(st.booleans()):
        return _request("bent body", headers, body)
    size = max(draw(st.sampled_from([5, 1000, 65_536])), len(body) // 2000)
    wire = _head((*headers, (b"Transfer-Encoding", b"chunked")))
    wire += _chunks(body, size) + b"0\r\n\r\n"
    return Request("bent body in chunks", (wire,), body=body)


# ---- attributes ----------------------------------------------------------------------

_HEADER_BYTES: Final = st.binary(max_size=40).map(
    lambda data: data.replace(b"\r", b"").replace(b"\n", b"")
)
_ATTRIBUTES: Final = (
    b"ce-specversion", b"ce-id", b"ce-source", b"ce-type", b"ce-time",
    b"ce-knativekafkapartition", b"ce-knativekafkaoffset", b"ce-topic", b"ce-subject",
    b"ce-datacontenttype", b"ce-dataschema", b"ce-data", b"ce-data_base64", b"ce-",
    b"ce-x\xe9", b"Content-Type", b"Content-Encoding", b"prefer", b"Kne-Trigger",
)  # fmt: skip
_VALUES: Final = (
    b"", b" ", b"0", b"-1", b"1.0", b"0.3", b"2.0", b"1", b"null", b"\xff", b"9" * 30,
    str(2**63).encode(), str(2**31).encode(), b"+5", b"0x5", "\u0665".encode(), b"\xb2",
    b"a b", b"%00", b"..", b"x" * 3000, b"dev.knative.kafka.event",
    b"com.example.topup.requested.v2", b"com.example.topup.requested.v1 ",
    b"not-a-time", b"gzip", b"text/plain", b"application/json; charset=utf-16",
    b'application/json; charset="UTF-8"', b"application/json;;=;charset",
    b"application/cloudevents+json", b"application/cloudevents+xml",
    b"application/cloudevents-batch+json", b"multipart/form-data",
    b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded",
    b"application/xml+json", b"/", b"#", b"a#" + b"t" * 300,
)  # fmt: skip


@st.composite
def _bent_attributes(draw: st.DrawFn) -> Request:
    headers = draw(st.sampled_from([_plain_headers, _binary_headers]))()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(_ATTRIBUTES))
        others = tuple(field for field in headers if field[0] != name)
        bend = draw(st.sampled_from(["without", "other", "other", "twice"]))
        if bend == "without":
            headers = others
            continue
        value = draw(st.sampled_from(_VALUES) | _HEADER_BYTES)
        headers = (*(headers if bend == "twice" else others), (name, value))
    body = json.dumps(new_order()).encode()
    return replace(_request("bent attributes", headers, body), is_odd=True)


_STRUCTURED_NAMES: Final = (
    "specversion", "id", "source", "type", "data", "time", "data_base64",
    "datacontenttype", "topic", "subject", "knativekafkapartition",
    "knativekafkaoffset", "Upper", "x" * 300, "\ud800", "a b",
)  # fmt: skip
_STRUCTURED_VALUES: Final = (
    *_ODD_VALUES, 5, "1.0", "0.3", "2.0", "e30", "e30=", "!!!!", "application/xml",
    "application/json; charset=latin-1", "com.example.topup.requested.v2", 2**63,
)  # fmt: skip


@st.composite
def _bent_structured(draw: st.DrawFn) -> Request:
    event = _event()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(_STRUCTURED_NAMES))
        if draw(st.booleans()):
            event.pop(name, None)
        else:
            value = draw(st.sampled_from(_STRUCTURED_VALUES) | _JSON)
            event[name] = _told(name, value)
    document: object = draw(st.sampled_from([event, [event], [event, event]]))
    # A record that claims to be an event and is none gets attributes beside it.
    beside = draw(st.sampled_from([(), (), _plain_headers()]))
    media = draw(st.sampled_from([
        b"application/cloudevents+json", b"application/cloudevents+json; charset=UTF-8",
        b"application/cloudevents+json; charset=utf-16",
        b"application/cloudevents-batch+json", b"Application/CloudEvents+JSON",
    ]))  # fmt: skip
    body = json.dumps(document).encode()
    return _request("bent structured", (*beside, (b"Content-Type", media)), body)


# ---- heads ---------------------------------------------------------------------------

_TOKEN: Final = st.text("abcXYZ-!#$%&'*+.^_`|~09", min_size=1, max_size=12).map(
    str.encode
)
_BENT_LINES: Final = (
    b"no colon", b": no name", b"blank in name: x", b" folded: x", b"x:\r\n folded",
    b"x: a\0b", b"x: a\rb", b"x: a\nb", b"x\x7f: a", b"x\xe9: a", b"x : a", b"x: \x01",
    b"ce_id: x", b"ce-kafkaheaderz: " + b"x" * 40_000,
    b"\r\n".join(b"h%d: x" % number for number in range(600)),
    b"\r\n".join(b"h%d: %s" % (number, b"x" * 30_000) for number in range(20)),
    b"Host: twice", b"Content-Type: text/plain\r\nContent-Type: application/json",
    b"Expect: the-impossible", b"Expect: 100-continue, x", b"Connection: close, x",
    b"Connection: \xff", b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off",
    b"X-HTTP-Method-Override: DELETE", b"Cookie: " + b"a=b; " * 500,
    b"Authorization: Basic \xff", b"Content-Encoding: gzip, br", b"Trailer: x",
    b"Range: bytes=0-0", b"If-None-Match: *", b"TE: trailers",
)  # fmt: skip
_BENT_VERSIONS: Final = (
    b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"http/1.1", b"HTTP/1.1 x",
    b"HTTP/11", b"", b"HTTP/1.\xb2",
)  # fmt: skip
_BENT_TARGETS: Final = (
    b"", b"*", b"f:80", b"\xe4", b"/\xe4", b"/a b", b"//[", b"?", b"http://[", b"/\x01",
    b"/" + b"x" * 9000, b"\\", b"http:///", b"://",
)  # fmt: skip


@st.composite
def _bent_heads(draw: st.DrawFn) -> Request:
    body = json.dumps(new_order()).encode()
    head = _head(_plain_headers() + _length(body))
    bend = draw(st.sampled_from([
        "line", "line", "header", "target", "version", "method", "empty lines",
        "bare lf",
    ]))  # fmt: skip
    match bend:
        case "line":
            head = head[:-2] + draw(st.sampled_from(_BENT_LINES)) + b"\r\n\r\n"
        case "header":
            line = draw(_TOKEN) + b": " + draw(_HEADER_BYTES)
            head = head[:-2] + line + b"\r\n\r\n"
        case "target":
            head = head.replace(
                b" / ", b" " + draw(st.sampled_from(_BENT_TARGETS)) + b" "
            )
        case "version":
            head = head.replace(b"HTTP/1.1", draw(st.sampled_from(_BENT_VERSIONS)), 1)
        case "method":
            method = draw(
                st.sampled_from([b"post", b"P#ST", b"", b"P" * 30, b"PO\xffT"])
            )
            head = head.replace(b"POST", method, 1)
        case "empty lines":
            head = draw(st.sampled_from([b"\r\n", b"\r\n\r\n", b"\n", b"\r"])) + head
        case _:
            head = head.replace(b"\r\n", b"\n")
    # Where no line ends, it would swallow the next request.
    is_last = bend == "bare lf"
    kind = f"bent head: {bend}"
    return Request(kind, (head + body,), body=body, is_odd=True, is_last=is_last)


@st.composite
def _other_methods(draw: st.DrawFn) -> Request:
    """No method but POST brings an event: whatever the body, nothing may be done."""
    method = draw(st.sampled_from(
        [
            b"GET", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE",
            b"CONNECT", b"PROPFIND", b"PRI", b"NOBODYS",
        ]))  # fmt: skip
    body = json.dumps(new_order()).encode() if draw(st.booleans()) else b""
    head = _head(
        _plain_headers() + _length(body),
        method=method,
        target=draw(st.sampled_from(_TARGETS)),
        host=draw(st.sampled_from(_HOSTS)),
    )
    return Request("other method", (head + body,), method, body=body, is_odd=True)


# ---- framing -------------------------------------------------------------------------

_LENGTHS: Final = (
    b"abc", b"-5", b"", b"+5", b"5,5", b"1_0", b"0x5", b"\xb2", b"5 5",
    "\u0665".encode(), b"5.0", b"9" * 5000,
)  # fmt: skip
_CODINGS: Final = (
    b"gzip", b"identity", b"chunked, chunked", b"xchunked", b"chunked, gzip", b"",
    b"chunked;q=1", b"chunked, x", b"\x0bchunked",
)  # fmt: skip
_CHUNKS: Final = (
    b"zz\r\n{}\r\n0\r\n\r\n", b"5\r\nabcdeXX0\r\n\r\n", b"-1\r\n\r\n",
    b"5\r\nabcdefgh\r\n0\r\n\r\n", b"+5\r\nabcde\r\n0\r\n\r\n",
    b"0x5\r\nabcde\r\n0\r\n\r\n", b"5_0\r\nabcde\r\n0\r\n\r\n",
    b'5;a="b\r\nabcde\r\n0\r\n\r\n', b"5\nabcde\n0\n\n", b"\r\n\r\n",
    b"2\r\n{}\r\n0\r\nno colon\r\n\r\n", b"5;\x00\r\nabcde\r\n0\r\n\r\n",
    b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n", b" 2\r\n{}\r\n0\r\n\r\n",
    b"2;" + b"x" * 99_000 + b"\r\n{}\r\n0\r\n\r\n",
)  # fmt: skip


@st.composite
def _bent_framing(draw: st.DrawFn) -> Request:
    """Nobody can know where such a body ends: it may only be asked for again."""
    headers, body = _plain_headers(), json.dumps(new_order()).encode()
    coded: Headers = ((b"Transfer-Encoding", b"chunked"),)
    bend = draw(st.sampled_from(
        [
            "length", "two lengths", "coding", "both", "old", "chunks", "cut", "cut",
            "cut chunk", "endless chunk",
        ]))  # fmt: skip
    is_last = bend.startswith(("cut", "endless"))
    match bend:
        case "length":
            framing: Headers = ((b"Content-Length", draw(st.sampled_from(_LENGTHS))),)
            # A length that it may believe: then the body is cut.
            is_last = True
        case "two lengths":
            framing = _length(body) + _length(body + draw(st.sampled_from([b"", b"x"])))
        case "coding":
            framing = ((b"Transfer-Encoding", draw(st.sampled_from(_CODINGS))),)
        case "both":
            framing, body = coded + _length(body), _chunks(body, 50) + b"0\r\n\r\n"
        case "chunks":
            framing, body = coded, draw(st.sampled_from(_CHUNKS))
        case "cut":
            more = draw(st.sampled_from([1, 100, 10**6, 10**18, 10**30]))
            framing = ((b"Content-Length", str(len(body) + more).encode()),)
        case "cut chunk":
            framing, body = coded, _chunks(body, draw(st.sampled_from([10, 1000])))[:-3]
        case "endless chunk":
            framing, body = (
                coded,
                b"%x\r\n" % 2 ** draw(st.sampled_from([30, 80])) + body,
            )
        case _:
            framing = coded
    version = b"HTTP/1.0" if bend == "old" else b"HTTP/1.1"
    wire = _head(headers + framing, version=version) + body
    return Request(f"bent framing: {bend}", (wire,), is_odd=True, is_last=is_last)


@st.composite
def _stalls(draw: st.DrawFn) -> Request:
    """It begins and never ends, while the connection stays."""
    wire = delivery_of(new_order()).pieces[0]
    head = wire.index(b"\r\n\r\n") + 4
    is_in_head = draw(st.sampled_from([False] * 9 + [True]))
    place = draw(
        st.integers(1, head - 1) if is_in_head else st.integers(head, len(wire) - 1)
    )
    kind = "stalled head" if is_in_head else "stalled body"
    return Request(kind, (wire[:place],), is_odd=True, is_last=True)


@st.composite
def _pauses(draw: st.DrawFn) -> Request:
    """The rest of the body comes too late."""
    wire = delivery_of(new_order()).pieces[0]
    place = draw(st.integers(wire.index(b"\r\n\r\n") + 4, len(wire) - 1))
    pieces = (wire[:place], wire[place:])
    return Request("late body", pieces, is_odd=True, is_last=True, pause_s=STALL_S)


@st.composite
def _endless_announcements(draw: st.DrawFn) -> Request:
    """So much comes that it is too large, and so much is announced as nobody has."""
    body = json.dumps(new_order()).encode() + b" " * EVENT_BYTES_MAX
    announced = draw(st.sampled_from([10**7, 2**63 - 1, 2**63, 10**30]))
    framing: Headers = ((b"Content-Length", str(announced).encode()),)
    wire = _head(_plain_headers() + framing) + body
    return Request("endless announcement", (wire,), body=body, is_last=True)


_TLS_HELLO: Final = (
    b"\x16\x03\x01\x00\x75\x01\x00\x00\x71\x03\x03" + bytes(range(32)) + b"\0" * 74
)
_GARBAGE: Final = (
    _TLS_HELLO, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    b"GET /\r\n\r\n", b"POST /\r\n\r\n", b"\0\0\0\r\n\r\n", b"\xff" * 20_000,
    b"SSH-2.0-x\r\n\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n\r\n",
    b"\r\n\r\n\r\n\r\n", b"{}\r\n\r\n", b"EHLO x\r\n\r\n",
    b"\x80\x2e\x01\x03\x01\r\n\r\n",
)  # fmt: skip


@st.composite
def _garbage(draw: st.DrawFn) -> Request:
    data = draw(st.sampled_from(_GARBAGE) | st.binary(min_size=1, max_size=99))
    return Request("garbage", (data,), b"", is_odd=True, is_last=True)


@st.composite
def _rests(draw: st.DrawFn) -> tuple[Request, Request]:
    """A length below the body's: what is beyond it looks like the next request."""
    body = json.dumps(new_order()).encode()
    length = draw(st.integers(0, len(body) - 1))
    first = _request("body beyond its length", _plain_headers(), body[:length])
    return first, Request("rest of a body", (body[length:] + b"\r\n\r\n",), is_odd=True)


# ---- a connection --------------------------------------------------------------------


def _paused_order() -> Request:
    """An order of a channel that a person has paused."""
    order = new_order() | {"channel": PAUSED_CHANNEL}
    return replace(delivery_of(order, "paused order"), order=None)


@st.composite
def _repetitions(draw: st.DrawFn) -> tuple[Request, ...]:
    """An order, and the same again, or another under its key."""
    order = new_order()
    other = order | {"amountMinor": 900}
    again = delivery_of(order, "repetition")
    reused = replace(delivery_of(other, "reused key"), order=None)
    return (delivery_of(order, "good order"), draw(st.sampled_from([again, reused])))


def _alone(
    requests: st.SearchStrategy[Request],
) -> st.SearchStrategy[tuple[Request, ...]]:
    return requests.map(lambda request: (request,))


#: Each as often as it stands here; what makes the server wait, seldom.
_PARTS: Final = (
    [_alone(_good_orders())] * 12
    + [_alone(_requests_with_bent_body())] * 10
    + [_alone(_bent_attributes())] * 8
    + [_alone(_bent_structured())] * 6
    + [_alone(_bent_heads())] * 6
    + [_alone(_bent_framing())] * 8
    + [_alone(_other_methods())] * 3
    + [_alone(_garbage())] * 3
    + [_repetitions()] * 3
    + [_rests()] * 2
    + [_alone(st.builds(_planted_error))]
    + [_alone(st.builds(_paused_order))]
    + [_alone(_endless_announcements())]
    + [_alone(_stalls())]
    + [_alone(_pauses())]
)  # fmt: skip


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    """One to four parts on one connection, good and bad mixed."""
    requests: list[Request] = []
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 4]))):
        requests += draw(st.sampled_from(_PARTS).flatmap(lambda part: part))
        if requests[-1].is_last:
            break
    ending: Ending = draw(st.sampled_from(["keep", "keep", "keep", "end", "vanish"]))
    if requests[-1].is_last and not _stays(requests[-1]):
        # Else it would be a stall, which is drawn seldom for the time that it takes.
        ending = draw(st.sampled_from(["end", "end", "vanish"]))
    return Exchange(tuple(requests), draw(st.booleans()), ending)


def _stays(request: Request) -> bool:
    return request.kind.startswith(("stalled", "late"))
