"""Which deliveries become an order, and how the others are refused.

A refusal decides the fate of a record: MalformedEvent and InvalidEvent end it in
quarantine, UnknownEventType brings it again, anything else blocks its partition.
"""

import base64
import json
from typing import Any, Final

import pytest
from cloudevents.http import from_http
from hypothesis import given
from hypothesis import strategies as st

from function.errors import EventError, InvalidEvent, MalformedEvent, UnknownEventType
from function.events import (
    JSON_DEPTH_MAX,
    RAW_EVENT_TYPE,
    attributes_of,
    position_of,
    read_topup,
    reply_to,
)
from function.model import Outcome, Position, Receipt, TopUp

EVENT_TYPE: Final = "com.example.topup.requested.v1"
SOURCE: Final = "/apis/v1/namespaces/shop/kafkasources/topup-source#topup-orders"
STRUCTURED: Final = {"Content-Type": "application/cloudevents+json; charset=UTF-8"}


def data(**changes: object) -> dict[str, Any]:
    order: dict[str, Any] = {
        "rechargeId": "r-1",
        "channel": "app",
        "msisdn": "+41791234567",
        "amountMinor": 500,
        "currency": "CHF",
        "requestedAt": "2026-01-02T03:04:05+01:00",
    }
    return order | changes


def binary(**changes: str | None) -> dict[str, str]:
    """Headers of binary mode as KafkaSource sends them; None leaves one out."""
    headers: dict[str, str | None] = {
        "ce-specversion": "1.0",
        "ce-id": "e-1",
        "ce-source": "/shop",
        "ce-type": EVENT_TYPE,
        "ce-time": "2026-11-23T04:38:00.123Z",
        "ce-knativekafkapartition": "3",
        "ce-knativekafkaoffset": "1042",
        "ce-topic": "topup-orders",
        "content-type": "application/json",
        "prefer": "reply",
    }
    given_names = {name.replace("_", "-"): value for name, value in changes.items()}
    return {k: v for k, v in (headers | given_names).items() if v is not None}


def raw(**changes: str | None) -> dict[str, str]:
    """Headers of a record that is no CloudEvent, exactly as KafkaSource sends them."""
    headers: dict[str, str | None] = {
        "ce-specversion": "1.0",
        "ce-id": "partition:3/offset:1042",
        "ce-source": SOURCE,
        "ce-type": RAW_EVENT_TYPE,
        "ce-subject": "partition:3#1042",
        "ce-time": "2026-11-23T04:38:00.123Z",
        "ce-key": "+41791234567",
        "ce-partitionkey": "+41791234567",
        "ce-kafkaheadertraceid": "abc",
        "ce-knativekafkapartition": "3",
        "ce-knativekafkaoffset": "1042",
        "prefer": "reply",
        "kn-namespace": "shop",
    }
    given_names = {name.replace("_", "-"): value for name, value in changes.items()}
    return {k: v for k, v in (headers | given_names).items() if v is not None}


def event(**changes: object) -> dict[str, Any]:
    document: dict[str, Any] = {
        "specversion": "1.0",
        "id": "e-1",
        "source": "/shop",
        "type": EVENT_TYPE,
        "datacontenttype": "application/json",
        "data": data(),
    }
    return document | changes


def read(body: object, headers: dict[str, str] | None = None) -> TopUp:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return read_topup(headers or binary(), body, EVENT_TYPE)


def refusal(
    kind: type[EventError], body: object, headers: dict[str, str] | None = None
) -> str:
    with pytest.raises(kind) as refused:
        read(body, headers)
    # The very class: a subclass would mean another outcome.
    assert type(refused.value) is kind
    return str(refused.value)


def with_number(written: str) -> bytes:
    """An order whose amount is written just so."""
    return json.dumps(data(amountMinor="?")).replace('"?"', written).encode()


# ---- the content modes --------------------------------------------------------------


def test_binary_mode_is_read_with_every_field() -> None:
    body = json.dumps(data(donorMsisdn="+41791234568")).encode()

    topup = read(body)

    assert topup == TopUp(
        idempotency_key="app:r-1",
        fingerprint=topup.fingerprint,
        channel="app",
        recharge_id="r-1",
        msisdn="+41791234567",
        amount_minor=500,
        currency="CHF",
        requested_at="2026-01-02T03:04:05+01:00",
        donor_msisdn="+41791234568",
        payload=body,
        position=Position("topup-orders", 3, 1042),
        event_id="e-1",
        event_source="/shop",
    )


def test_structured_mode_is_read_as_the_same_order() -> None:
    structured, binary_mode = read(event(), STRUCTURED), read(data())

    assert structured.idempotency_key == binary_mode.idempotency_key
    assert structured.fingerprint == binary_mode.fingerprint
    assert json.loads(structured.payload) == data()
    assert structured.position is None


def test_structured_mode_with_base64_data_is_read() -> None:
    encoded = base64.b64encode(json.dumps(data()).encode()).decode()
    document = event(data_base64=encoded)
    del document["data"]

    assert read(document, STRUCTURED).fingerprint == read(data()).fingerprint


def test_raw_record_without_content_type_is_an_order() -> None:
    body = json.dumps(data()).encode()

    topup = read(body, raw())

    assert topup.payload == body
    assert topup.position == Position("topup-orders", 3, 1042)
    assert topup.event_id == "partition:3/offset:1042"


def test_raw_record_with_content_type_is_an_order() -> None:
    assert read(data(), raw(content_type="application/json")).channel == "app"


def test_raw_record_that_claims_structured_mode_is_decided_by_its_body() -> None:
    headers = raw(content_type="application/cloudevents+json")

    assert read(event(), headers).position == Position("topup-orders", 3, 1042)
    for broken in (b"{", b"no", json.dumps(data()).encode()):
        refusal(MalformedEvent, broken, headers)
    assert position_of(headers) == Position("topup-orders", 3, 1042)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/topup+json",
        "text/json",
    ],
)
def test_content_type_of_json_is_accepted(content_type: str) -> None:
    assert read(data(), binary(content_type=content_type)).channel == "app"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/xml",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "application/jsonp",
        "multipart/form-data",
    ],
)
def test_other_content_type_is_malformed(content_type: str) -> None:
    message = refusal(MalformedEvent, data(), binary(content_type=content_type))
    assert message.startswith("Content-Type:")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents-batch+json",
        "application/cloudevents+avro",
        "application/cloudevents",
        "application/cloudevents+json; charset=utf-16",
    ],
)
def test_batch_and_other_event_formats_are_malformed(content_type: str) -> None:
    headers = {"Content-Type": content_type}

    refusal(MalformedEvent, [event()], headers)
    assert refusal(MalformedEvent, event(), headers).startswith("Content-Type:")


def test_list_in_structured_mode_is_malformed() -> None:
    refusal(MalformedEvent, [event()], STRUCTURED)


@pytest.mark.parametrize("inner", ["text/plain", "application/json;charset=x", 5])
def test_structured_data_of_another_type_is_malformed(inner: object) -> None:
    refusal(MalformedEvent, event(datacontenttype=inner), STRUCTURED)


@pytest.mark.parametrize("broken", ["!!", "e30", "é30=", None, 5, [], {}])
def test_broken_base64_is_malformed(broken: object) -> None:
    document = event(data_base64=broken)
    del document["data"]

    assert refusal(MalformedEvent, document, STRUCTURED).startswith("data_base64")


def test_structured_event_with_both_kinds_of_data_is_malformed() -> None:
    other = base64.b64encode(json.dumps(data(amountMinor=1)).encode()).decode()

    refusal(MalformedEvent, event(data_base64=other), STRUCTURED)


def test_structured_event_without_data_is_malformed() -> None:
    document = event()
    del document["data"]

    assert refusal(MalformedEvent, document, STRUCTURED) == "data: is missing"


# ---- attributes ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
def test_missing_attribute_is_malformed(name: str) -> None:
    document = event()
    del document[name]

    refusal(MalformedEvent, data(), binary(**{f"ce_{name}": None}))
    refusal(MalformedEvent, document, STRUCTURED)


@pytest.mark.parametrize("name", ["id", "source", "type"])
def test_empty_attribute_is_malformed(name: str) -> None:
    refusal(MalformedEvent, data(), binary(**{f"ce_{name}": ""}))
    refusal(MalformedEvent, event(**{name: ""}), STRUCTURED)


@pytest.mark.parametrize("value", [None, 5, True, 1.5, [], {}, ["1.0"]])
@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
def test_attribute_that_is_no_text_is_malformed(name: str, value: object) -> None:
    refusal(MalformedEvent, event(**{name: value}), STRUCTURED)


@pytest.mark.parametrize("version", ["2.0", "0.3", "1", ""])
def test_other_specversion_is_malformed(version: str) -> None:
    refusal(MalformedEvent, data(), binary(ce_specversion=version))
    refusal(MalformedEvent, event(specversion=version), STRUCTURED)


def test_request_without_any_attribute_is_malformed() -> None:
    refusal(MalformedEvent, data(), {"Content-Type": "application/json"})
    refusal(MalformedEvent, b"", {})


@pytest.mark.parametrize(
    "event_type",
    ["com.example.topup.requested.v2", "com.example.topup.cancelled.v1", "other", "É"],
)
def test_unknown_type_or_version_is_an_order_for_newer_software(
    event_type: str,
) -> None:
    message = refusal(UnknownEventType, data(), binary(ce_type=event_type))

    assert event_type not in message
    refusal(UnknownEventType, event(type=event_type), STRUCTURED)


def test_unknown_type_comes_before_what_is_wrong_with_its_body() -> None:
    headers = binary(ce_type="com.example.topup.requested.v2", content_type="text/xml")

    refusal(UnknownEventType, b"<order/>", headers)
    newer = event(type=headers["ce-type"], datacontenttype="text/xml", data="<order/>")
    refusal(UnknownEventType, newer, STRUCTURED)
    del newer["data"]
    refusal(UnknownEventType, newer | {"data_base64": "!"}, STRUCTURED)


def test_header_names_are_read_in_any_case() -> None:
    headers = {name.title(): value for name, value in binary().items()}

    assert read(data(), headers).position == Position("topup-orders", 3, 1042)


# ---- JSON in which nothing has two meanings ----------------------------------------


@pytest.mark.parametrize("body", [b"", b" \r\n\t"])
def test_empty_body_is_malformed(body: bytes) -> None:
    """A tombstone is a record without a value."""
    for headers in (binary(), raw(), STRUCTURED):
        assert refusal(MalformedEvent, body, headers) == "body: is empty"


@pytest.mark.parametrize(
    "body", [b"{", b"no", b"{'a': 1}", b"{}{}", b"\xef\xbb\xbf{}", b"\x00", b"[1,]"]
)
def test_body_that_is_no_json_is_malformed(body: bytes) -> None:
    assert refusal(MalformedEvent, body) == "body: is not JSON"


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "latin-1"])
def test_body_in_another_encoding_is_malformed(codec: str) -> None:
    body = json.dumps(data(channel="é"), ensure_ascii=False).encode(codec)

    refusal(MalformedEvent, body)
    refusal(MalformedEvent, body, raw())


def test_name_that_comes_twice_is_malformed() -> None:
    twice = json.dumps(data()).encode()[:-1] + b', "amountMinor": 1}'
    nested = json.dumps(data(more="?")).replace('"?"', '{"a":1,"a":1}').encode()

    for body in (twice, nested):
        assert "twice" in refusal(MalformedEvent, body)
    structured = json.dumps(event()).encode()[:-1] + b', "data": {}}'
    assert "twice" in refusal(MalformedEvent, structured, STRUCTURED)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constant_that_is_no_json_is_malformed(constant: str) -> None:
    refusal(MalformedEvent, with_number(constant))
    refusal(MalformedEvent, json.dumps(data(x="?")).replace('"?"', constant).encode())


def test_integer_of_5001_digits_is_malformed() -> None:
    digits = str(10) + "0" * 4999

    refusal(MalformedEvent, with_number(digits))
    in_an_event = json.dumps(event(data="?")).replace('"?"', digits)
    refusal(MalformedEvent, in_an_event.encode(), STRUCTURED)


@pytest.mark.parametrize("headers", [binary(), raw(), STRUCTURED])
@pytest.mark.parametrize("depth", [JSON_DEPTH_MAX + 1, 900, 4_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_malformed(
    headers: dict[str, str], depth: int, opening: str, closing: str
) -> None:
    body = (opening * depth + "1" + closing * depth).encode()

    assert refusal(MalformedEvent, body, headers) == "body: is nested too deeply"


def test_nesting_that_is_not_deep_is_kept() -> None:
    nested: Any = 1
    for _ in range(JSON_DEPTH_MAX - 2):
        nested = [nested]

    assert read(data(more=nested)).channel == "app"


@pytest.mark.parametrize("half", ["\ud800", "a\udbffb", "\udc00\ud800"])
def test_lone_surrogate_is_malformed(half: str) -> None:
    """Never an unforeseen error, wherever it stands: that would block the partition."""
    for name in ("channel", "rechargeId", "msisdn", "currency", "later"):
        refusal(MalformedEvent, data(**{name: half}))
        refusal(MalformedEvent, event(data=data(**{name: half})), STRUCTURED)
    for more in ({half: 1}, {half: 1, "a": 1, "b": 2}, {"a": [{half: 1}]}):
        refusal(MalformedEvent, data(**more))
    for name in ("id", "source", "type", "subject"):
        refusal(MalformedEvent, event(**{name: half}), STRUCTURED)


def test_surrogate_pair_is_one_character() -> None:
    assert read(json.dumps(data(channel="📱")).encode()).channel == "📱"


# ---- the rules of the data ----------------------------------------------------------


@pytest.mark.parametrize("body", [[], "text", 5, None, True, {}])
def test_data_that_is_no_order_is_invalid(body: object) -> None:
    refusal(InvalidEvent, body)


@pytest.mark.parametrize(
    "name", ["rechargeId", "channel", "msisdn", "amountMinor", "currency"]
)
def test_missing_field_is_named(name: str) -> None:
    order = data()
    del order[name]

    assert refusal(InvalidEvent, order) == f"{name}: is required"
    assert refusal(InvalidEvent, data(**{name: None})).startswith(name)


@pytest.mark.parametrize(
    "written",
    [
        *("5.0", "5e2", "500.5", "1E2", "true", "false", '"500"', "0", "-1", "null"),
        *("-0", "1000000000000", "1e400", "9" * 4000),
    ],
)
def test_amount_that_is_no_positive_integer_is_invalid(written: str) -> None:
    assert refusal(InvalidEvent, with_number(written)).startswith("amountMinor")


@pytest.mark.parametrize("amount", [1, 999_999_999_999])
def test_amount_at_either_bound_is_accepted(amount: int) -> None:
    assert read(data(amountMinor=amount)).amount_minor == amount


@pytest.mark.parametrize("currency", ["chf", "ABC", "CH", "CHFR", "", "756", "CHF\n"])
def test_unknown_currency_is_invalid(currency: str) -> None:
    assert refusal(InvalidEvent, data(currency=currency)).startswith("currency")


@pytest.mark.parametrize(
    "number",
    [
        "+41791234567",
        # Possible, though no operator has this range today.
        "+12001230101",
        "+8613800138000",
        "+390612345678",
        "+8835100012345",
    ],
)
def test_possible_number_is_accepted(number: str) -> None:
    assert read(data(msisdn=number)).msisdn == number
    assert read(data(donorMsisdn=number)).donor_msisdn == number


@pytest.mark.parametrize(
    "number",
    [
        "",
        "41791234567",
        "0041791234567",
        "0791234567",
        "+41 79 123 45 67",
        "+41791234567\n",
        "+4179123456a",
        "+٤١٧٩١٢٣٤٥٦٧",
        "tel:+41791234567",
        # Not possible: too short, too long, no such country.
        "+4179123",
        "+1200123010155",
        "+999123456789",
        # Not canonical: the national trunk zero.
        "+4407911123456",
    ],
)
def test_other_number_is_invalid(number: str) -> None:
    assert refusal(InvalidEvent, data(msisdn=number)).startswith("msisdn")
    assert refusal(InvalidEvent, data(donorMsisdn=number)).startswith("donorMsisdn")


@pytest.mark.parametrize(
    "moment", ["2026-01-02", "2026-01-02T03:04:05", "2026-02-30T00:00:00Z", "now", ""]
)
def test_time_without_offset_or_meaning_is_invalid(moment: str) -> None:
    assert refusal(InvalidEvent, data(requestedAt=moment)).startswith("requestedAt")


def test_unknown_field_is_kept_in_the_payload() -> None:
    body = b'{"later": {"x": 1.10}, ' + json.dumps(data()).encode()[1:]

    assert read(body).payload == body
    structured = read(event(data=data(later=[1])), STRUCTURED)
    assert json.loads(structured.payload)["later"] == [1]


# ---- the idempotency key ------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel", "recharge_id", "key"),
    [
        ("app", "r-1", "app:r-1"),
        ("App", "R-1", "App:R-1"),
        ("e", "1", "e:1"),
        ("é", "1", "%C3%A9:1"),
        # The same letter as two characters is another order.
        ("e\u0301", "1", "e%CC%81:1"),
        ("x ", "1", "x%20:1"),
        ("x", " 1", "x:%201"),
        ("a:b", "c", "a%3Ab:c"),
        ("a", "b:c", "a:b%3Ac"),
        ("a%3Ab", "c", "a%253Ab:c"),
        ("充值", "1", "%E5%85%85%E5%80%BC:1"),
        ("app", "📱", "app:%F0%9F%93%B1"),
        ("a/b", "?&=\n\0", "a%2Fb:%3F%26%3D%0A%00"),
        ("-._~", "1", "-._~:1"),
    ],
)
def test_key_is_channel_and_recharge_id_percent_encoded(
    channel: str, recharge_id: str, key: str
) -> None:
    topup = read(data(channel=channel, rechargeId=recharge_id))

    assert topup.idempotency_key == key
    assert (topup.channel, topup.recharge_id) == (channel, recharge_id)


@given(
    one=st.tuples(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9)),
    other=st.tuples(st.text(min_size=1, max_size=9), st.text(min_size=1, max_size=9)),
)
def test_two_orders_have_two_keys(one: tuple[str, str], other: tuple[str, str]) -> None:
    keys = [
        read(data(channel=c, rechargeId=r)).idempotency_key for c, r in (one, other)
    ]

    assert (keys[0] == keys[1]) == (one == other)
    assert all(key.isascii() and key.isprintable() and " " not in key for key in keys)


def test_key_of_200_characters_is_the_longest() -> None:
    longest = {"channel": "c" * 61, "rechargeId": "é" * 23}

    assert len(read(data(**longest)).idempotency_key) == 200
    longest["channel"] += "c"
    message = refusal(InvalidEvent, data(**longest))
    assert message.startswith("channel, rechargeId")


@pytest.mark.parametrize("part", ["channel", "rechargeId"])
def test_empty_part_of_the_key_is_invalid(part: str) -> None:
    assert refusal(InvalidEvent, data(**{part: ""})).startswith(part)


# ---- the fingerprint ----------------------------------------------------------------


def test_redelivery_with_another_time_and_event_id_has_the_same_fingerprint() -> None:
    first = read(data())
    again = read(
        data(requestedAt="2027-01-01T00:00:00Z", donorMsisdn=None, later=1),
        binary(ce_id="e-2", ce_time=None, ce_knativekafkaoffset="7", ce_source="/b"),
    )

    assert again.fingerprint == first.fingerprint
    assert again.idempotency_key == first.idempotency_key


@pytest.mark.parametrize(
    "change",
    [
        {"amountMinor": 501},
        {"currency": "EUR"},
        {"msisdn": "+41791234569"},
        {"donorMsisdn": "+41791234569"},
    ],
)
def test_other_content_has_another_fingerprint(change: dict[str, object]) -> None:
    assert read(data(**change)).fingerprint != read(data()).fingerprint


def test_donor_and_receiver_exchanged_have_another_fingerprint() -> None:
    one = data(msisdn="+41791234567", donorMsisdn="+41791234568")
    other = data(msisdn="+41791234568", donorMsisdn="+41791234567")

    assert read(one).fingerprint != read(other).fingerprint


# ---- the position -------------------------------------------------------------------


def test_topic_comes_from_the_overrides_before_the_source() -> None:
    position = read(data(), raw(ce_topic="other")).position

    assert position == Position("other", 3, 1042)


def test_topic_in_the_source_of_a_cloud_event_is_the_producers_own() -> None:
    assert position_of(binary(ce_topic=None, ce_source=SOURCE)) is None


def test_position_in_a_structured_event_is_read() -> None:
    extensions = {"topic": "t", "knativekafkapartition": 0}
    document = event(**extensions, knativekafkaoffset=2**63 - 1)

    assert read(document, STRUCTURED).position == Position("t", 0, 2**63 - 1)


@pytest.mark.parametrize(
    "value",
    [
        *("", " 1", "+1", "-1", "1.0", "1e3", "0x1", "1_0", "٣", "²", "true"),
        *("9" * 5000, "9223372036854775808"),
    ],
)
@pytest.mark.parametrize("name", ["partition", "offset"])
def test_hostile_number_is_no_position(name: str, value: str) -> None:
    headers = binary(**{f"ce_knativekafka{name}": value})

    assert position_of(headers) is None
    assert read(data(), headers).position is None


def test_partition_beyond_kafkas_range_is_no_position() -> None:
    assert position_of(binary(ce_knativekafkapartition=str(2**31))) is None
    assert position_of(binary(ce_knativekafkapartition=str(2**31 - 1))) is not None


@pytest.mark.parametrize("topic", ["", "a b", "a'b", "é", "a/b", "t" * 250, "a\n"])
def test_hostile_topic_is_no_position(topic: str) -> None:
    assert position_of(binary(ce_topic=topic)) is None


def test_position_is_read_from_headers_alone() -> None:
    """Quarantine asks for it when the body can't be read."""
    assert position_of({"CE-Topic": "t"} | binary(ce_topic=None)) == Position(
        "t", 3, 1042
    )
    assert position_of({}) is None


def test_attributes_are_kept_within_bounds() -> None:
    many = {f"ce-x{i}": "v" * 5000 for i in range(500)}

    kept = attributes_of({"Content-Type": "a/b", "Authorization": "secret"} | many)

    assert kept["content-type"] == "a/b"
    assert "authorization" not in kept
    assert len(kept) <= 100
    assert max(map(len, kept.values())) <= 1024


# ---- no message quotes --------------------------------------------------------------

#: Stands in every value that Hypothesis makes, and in no message of ours.
MARK: Final = "7731"
leaves = (
    st.none()
    | st.booleans()
    | st.integers().map(lambda n: int(f"{n}{MARK}"))
    | st.floats(allow_nan=True)
    | st.text(max_size=20).map(lambda text: MARK + text)
)
documents = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5).map(lambda n: MARK + n), inner, max_size=4
        )
    ),
    max_leaves=10,
)
changes = st.dictionaries(st.sampled_from(sorted(data())), documents, max_size=3)


def read_or_refuse(headers: dict[str, str], body: bytes) -> str:
    """The message of the refusal, or nothing; any other error fails the test."""
    try:
        topup = read_topup(headers, body, EVENT_TYPE)
    except EventError as error:
        return str(error)
    assert isinstance(topup, TopUp)
    return ""


@given(body=documents)
def test_no_json_is_quoted_or_unforeseen(body: object) -> None:
    written = json.dumps(body).encode()

    for headers in (binary(), raw(), STRUCTURED):
        assert MARK not in read_or_refuse(headers, written)


@given(change=changes, more=documents)
def test_no_broken_order_is_quoted_or_unforeseen(
    change: dict[str, object], more: object
) -> None:
    order = data(**change) | {f"{MARK}more": more}

    assert MARK not in read_or_refuse(binary(), json.dumps(order).encode())
    structured = json.dumps(event(data=order)).encode()
    assert MARK not in read_or_refuse(STRUCTURED, structured)


@given(
    change=st.dictionaries(
        st.sampled_from([*sorted(event()), "data_base64", "time", "topic", MARK]),
        documents,
        max_size=4,
    )
)
def test_no_broken_event_is_quoted_or_unforeseen(change: dict[str, object]) -> None:
    body = json.dumps(event(**change)).encode()

    assert MARK not in read_or_refuse(STRUCTURED, body)


@given(body=st.binary(max_size=200), content_type=st.text(max_size=30))
def test_no_bytes_are_unforeseen(body: bytes, content_type: str) -> None:
    for headers in (binary(), raw(), STRUCTURED, binary(content_type=content_type)):
        read_or_refuse(headers, body)


@given(
    headers=st.dictionaries(
        st.sampled_from([*binary(), "ce-", "ce-data", "ce-datacontenttype", "ce-é"]),
        st.text(max_size=20).map(lambda text: MARK + text),
    )
)
def test_no_headers_are_quoted_or_unforeseen(headers: dict[str, str]) -> None:
    body = json.dumps(data()).encode()

    assert MARK not in read_or_refuse(binary() | headers, body)
    position_of(headers)
    attributes_of(headers)


# ---- the reply ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "word"),
    [(Outcome.SUCCEEDED, "succeeded"), (Outcome.ACCEPTED, "accepted")],
)
def test_reply_is_a_cloud_event_of_its_own_type(outcome: Outcome, word: str) -> None:
    topup = read(data(channel="é"))

    reply = from_http(*reply_to(topup, Receipt(outcome, "ref-1"), EVENT_TYPE))

    assert reply["type"] == f"com.example.topup.{word}.v1"
    assert reply["id"] == f"%C3%A9:r-1:{word}"
    assert reply.data == {
        "rechargeId": "r-1",
        "channel": "é",
        "amountMinor": 500,
        "currency": "CHF",
        "reference": "ref-1",
    }
    # Whoever reads completions has no need of the subscriber's number.
    assert topup.msisdn not in json.dumps(reply.data)


def test_reply_can_not_be_taken_for_an_order() -> None:
    """A Broker that routes it back to us would else begin a loop."""
    reply = reply_to(read(data()), Receipt(Outcome.SUCCEEDED, "ref"), EVENT_TYPE)

    refusal(UnknownEventType, reply[1], reply[0])
