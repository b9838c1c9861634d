"""The stand-in's mapping and arithmetic, line by line of the facts it imitates."""

import base64
import json
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cloud_event_mapping import (
    KeyType,
    Record,
    RecordDiscardedError,
    StuckPartitionError,
    convert_poll,
    dead_letter_headers,
    is_raw,
    to_cloud_event,
    unsendable_header,
)
from demo.delivery import (
    MAX_POLL_INTERVAL_MS_MAX,
    Delivery,
    backoff_s,
    duration_s,
    is_retried,
    is_success,
)

# 2026-11-23T04:38:00.123Z
TIMESTAMP_MS = 1_795_408_680_123
CE_HEADERS: tuple[tuple[str, bytes | None], ...] = (
    ("ce_specversion", b"1.0"),
    ("ce_id", b"42"),
    ("ce_source", b"/shop/app"),
    ("ce_type", b"com.example.topup.requested.v1"),
)
STRUCTURED = ("content-type", b"application/cloudevents+json")
ENVELOPE = {"specversion": "1.0", "id": "42", "source": "/shop/app", "type": "t"}
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(
    *headers: tuple[str, bytes | None],
    value: bytes | None = b"{}",
    key: bytes | None = None,
    timestamp_ms: int = TIMESTAMP_MS,
) -> Record:
    return Record("recharge.orders", 3, 1042, key, value, headers, timestamp_ms)


def mapped(
    item: Record,
    *,
    ce_overrides: dict[str, str] | None = None,
    key_type: KeyType = "string",
) -> tuple[dict[str, str], bytes]:
    return to_cloud_event(
        item,
        namespace="shop",
        source_name="recharge-source",
        ce_overrides=ce_overrides or {},
        key_type=key_type,
        new_span_id=lambda: "1111111111111111",
    )


def headers_of(item: Record, key_type: KeyType = "string") -> dict[str, str]:
    return mapped(item, key_type=key_type)[0]


# -- Raw records ---------------------------------------------------------------------


def test_raw_record_becomes_exactly_the_documented_request() -> None:
    item = record(
        ("Trace-Id", b"abc"),
        ("Content-Type", b"Application/JSON"),
        key=b"13800138000",
        value=b'{"a": 1}',
    )
    assert mapped(item) == (
        {
            "Prefer": "reply",
            "Kn-Namespace": "shop",
            "ce-specversion": "1.0",
            "ce-id": "partition:3/offset:1042",
            "ce-source": (
                "/apis/v1/namespaces/shop/kafkasources/recharge-source#recharge.orders"
            ),
            "ce-type": "dev.knative.kafka.event",
            "ce-subject": "partition:3#1042",
            "ce-time": "2026-11-23T04:38:00.123Z",
            "ce-key": "13800138000",
            "ce-partitionkey": "13800138000",
            "ce-kafkaheadertraceid": "abc",
            "ce-knativekafkapartition": "3",
            "ce-knativekafkaoffset": "1042",
            "Content-Type": "application/json",
            "Content-Length": "8",
        },
        b'{"a": 1}',
    )


@pytest.mark.parametrize("key", [None, b""])
def test_raw_record_without_a_key_has_no_key_attributes(key: bytes | None) -> None:
    assert not headers_of(record(key=key)).keys() & {"ce-key", "ce-partitionkey"}


def test_raw_record_without_a_content_type_has_none() -> None:
    assert "Content-Type" not in headers_of(record())


def test_tombstone_has_an_empty_body() -> None:
    headers, body = mapped(record(value=None))
    assert (headers["Content-Length"], body) == ("0", b"")


def test_repeated_raw_header_last_one_wins() -> None:
    headers = headers_of(record(("x", b"1"), ("X", b"2")))
    assert headers["ce-kafkaheaderx"] == "2"


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("traceparent", "ce-kafkaheadertraceparent"),
        ("ce_specversion", "ce-kafkaheadercespecversion"),
        ("X_Y-1", "ce-kafkaheaderxy1"),
        ("重", "ce-kafkaheader"),
    ],
)
def test_raw_header_name_keeps_only_letters_and_digits(
    name: str, extension: str
) -> None:
    assert extension in headers_of(record((name, b"v")))


@pytest.mark.parametrize(
    ("timestamp_ms", "text"),
    [
        (TIMESTAMP_MS, "2026-11-23T04:38:00.123Z"),
        (TIMESTAMP_MS - 3, "2026-11-23T04:38:00.12Z"),
        (TIMESTAMP_MS - 123, "2026-11-23T04:38:00Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
    ],
)
def test_time_is_written_as_java_writes_it(timestamp_ms: int, text: str) -> None:
    assert headers_of(record(timestamp_ms=timestamp_ms))["ce-time"] == text


@pytest.mark.parametrize(
    ("key_type", "key", "text"),
    [
        ("string", b"+86138", "+86138"),
        ("int", struct.pack(">i", -7), "-7"),
        ("int", b"+8613800", "+8613800"),
        ("float", struct.pack(">f", 1.1), "1.1"),
        ("float", struct.pack(">d", 1.1), "1.1"),
        ("float", b"abc", "abc"),
        ("byte-array", b"\x00\xff", "AP8="),
    ],
)
def test_key_is_written_by_its_type(key_type: KeyType, key: bytes, text: str) -> None:
    assert headers_of(record(key=key), key_type)["ce-key"] == text


def test_what_ascii_and_latin_1_lack_becomes_question_marks() -> None:
    headers = headers_of(record(key="é中😀".encode()))
    assert headers["ce-key"] == "é???"


def test_control_character_is_named_as_unsendable() -> None:
    assert unsendable_header(headers_of(record(("x", b"a\nb")))) == "ce-kafkaheaderx"
    assert unsendable_header(headers_of(record(("x", b"a b")))) is None


# -- CloudEvent records --------------------------------------------------------------


def test_binary_record_becomes_the_same_event() -> None:
    item = record(
        *CE_HEADERS,
        ("ce_partitionkey", b"k"),
        ("content-type", b"application/JSON"),
        ("other", b"dropped"),
        key=b"not exposed",
    )
    assert mapped(item) == (
        {
            "Prefer": "reply",
            "Kn-Namespace": "shop",
            "ce-specversion": "1.0",
            "ce-id": "42",
            "ce-source": "/shop/app",
            "ce-type": "com.example.topup.requested.v1",
            "ce-partitionkey": "k",
            "ce-knativekafkapartition": "3",
            "ce-knativekafkaoffset": "1042",
            "Content-Type": "application/JSON",
            "Content-Length": "2",
        },
        b"{}",
    )


@pytest.mark.parametrize("missing", ["ce_specversion", "ce_id", "ce_source", "ce_type"])
def test_binary_record_without_a_mandatory_attribute_is_raw(missing: str) -> None:
    headers = headers_of(record(*(h for h in CE_HEADERS if h[0] != missing)))
    assert headers["ce-type"] == "dev.knative.kafka.event"
    assert "ce-kafkaheadercetype" in headers or missing == "ce_type"


@pytest.mark.parametrize(
    "bad",
    [
        ("ce_specversion", b"2.0"),
        ("ce_source", b"not a uri"),
        ("ce_time", b"yesterday"),
        ("ce_bad-name", b"x"),
    ],
)
def test_binary_record_that_the_sdk_refuses_is_raw(bad: tuple[str, bytes]) -> None:
    assert is_raw(record(*CE_HEADERS, bad))


def test_structured_record_is_sent_binary() -> None:
    document = {
        **ENVELOPE,
        "time": "2026-11-23T12:38:00+08:00",
        "datacontenttype": "application/json",
        "number": 7,
        "flag": True,
        "data": {"amount": 100, "name": "é"},
    }
    value = json.dumps(document).encode()
    content_type = ("content-type", b"application/cloudevents+json; charset=utf-8")
    headers, body = mapped(record(content_type, ("other", b"x"), value=value))
    assert body == '{"amount":100,"name":"é"}'.encode()
    assert headers == {
        "Prefer": "reply",
        "Kn-Namespace": "shop",
        "ce-specversion": "1.0",
        "ce-id": "42",
        "ce-source": "/shop/app",
        "ce-type": "t",
        "ce-time": "2026-11-23T12:38:00+08:00",
        "ce-number": "7",
        "ce-flag": "true",
        "ce-knativekafkapartition": "3",
        "ce-knativekafkaoffset": "1042",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }


@pytest.mark.parametrize(
    ("data", "body"),
    [
        ({}, b""),
        ({"data_base64": "AAE="}, b"\x00\x01"),
        ({"data": "text", "datacontenttype": "text/plain"}, b"text"),
        ({"data": "text"}, b'"text"'),
    ],
)
def test_structured_data_is_decoded(data: dict[str, str], body: bytes) -> None:
    value = json.dumps({**ENVELOPE, **data}).encode()
    assert mapped(record(STRUCTURED, value=value))[1] == body


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"{",
        b"[]",
        b'{"specversion": "1.0"}',
        b"\xff",
        b'{"a": NaN}',
        b'{"a":' * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        json.dumps({**ENVELOPE, "id": 42}).encode(),
        json.dumps({**ENVELOPE, "data": 1, "data_base64": "AA=="}).encode(),
        json.dumps({**ENVELOPE, "data_base64": "?"}).encode(),
        json.dumps(
            {**ENVELOPE, "data": {}, "datacontenttype": "text/plain"},
        ).encode(),
    ],
)
def test_malformed_structured_record_is_raw_and_keeps_its_content_type(
    value: bytes | None,
) -> None:
    headers, body = mapped(record(STRUCTURED, value=value))
    assert headers["Content-Type"] == "application/cloudevents+json"
    assert headers["ce-type"] == "dev.knative.kafka.event"
    assert body == (value or b"")


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/cloudevents+avro"]
)
def test_structured_record_of_another_content_type_is_raw(content_type: str) -> None:
    value = json.dumps(ENVELOPE).encode()
    assert is_raw(record(("content-type", content_type.encode()), value=value))


# -- Both ----------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [(), CE_HEADERS])
def test_overrides_come_last(headers: tuple[tuple[str, bytes | None], ...]) -> None:
    overrides = {"topic": "recharge-orders", "knativekafkaoffset": "7"}
    result, _ = mapped(record(*headers), ce_overrides=overrides)
    assert result["ce-topic"] == "recharge-orders"
    assert result["ce-knativekafkaoffset"] == "7"


@pytest.mark.parametrize("headers", [(), CE_HEADERS])
def test_traceparent_keeps_the_trace_under_a_new_span(
    headers: tuple[tuple[str, bytes | None], ...],
) -> None:
    result = headers_of(record(*headers, ("traceparent", PARENT.encode())))
    expected = PARENT.replace("00f067aa0ba902b7", "1111111111111111")
    assert result["traceparent"] == expected


@pytest.mark.parametrize("parent", [b"", b"nonsense", f"00-{'0' * 32}-{'1' * 16}-01"])
def test_traceparent_that_is_none_is_not_sent(parent: bytes | str) -> None:
    value = parent if isinstance(parent, bytes) else parent.encode()
    assert "traceparent" not in headers_of(record(("traceparent", value)))


HEADERS = st.lists(st.tuples(st.text(max_size=12), st.binary(max_size=12)), max_size=5)


@given(
    headers=HEADERS,
    is_event=st.booleans(),
    value=st.none() | st.binary(max_size=64),
    key=st.none() | st.binary(max_size=16),
)
def test_any_record_without_null_headers_becomes_a_writable_request(
    headers: list[tuple[str, bytes | None]],
    *,
    is_event: bool,
    value: bytes | None,
    key: bytes | None,
) -> None:
    items = [*(CE_HEADERS if is_event else ()), *headers]
    result, body = mapped(record(*items, value=value, key=key))
    assert body == (value or b"")
    assert result["Content-Length"] == str(len(body))
    assert result["ce-knativekafkaoffset"] == "1042"
    for name, text in result.items():
        assert re.fullmatch(r"ce-[a-z0-9]+|[A-Za-z-]+", name)
        assert text.encode("latin-1").decode("latin-1") == text.strip(" \t")


# -- Silent discards -----------------------------------------------------------------


def test_null_header_of_a_raw_record_discards_all_raw_records_of_its_poll() -> None:
    poll = [record(), record(("x", None)), record(*CE_HEADERS), record()]
    results = convert_poll(poll, namespace="n", source_name="s", ce_overrides={})
    assert [isinstance(result, RecordDiscardedError) for _, result in results] == [
        True,
        True,
        False,
        True,
    ]


def test_null_header_of_a_cloud_event_discards_it_alone() -> None:
    poll = [record(), record(*CE_HEADERS, ("x", None)), record(*CE_HEADERS)]
    results = convert_poll(poll, namespace="n", source_name="s", ce_overrides={})
    assert [isinstance(result, RecordDiscardedError) for _, result in results] == [
        False,
        True,
        False,
    ]


def test_null_content_type_of_a_raw_record_discards_it() -> None:
    with pytest.raises(RecordDiscardedError):
        mapped(record(("Content-Type", None)))


# -- Dead letters --------------------------------------------------------------------


def dead(
    status: int | None, response_headers: dict[str, str], body: bytes
) -> dict[str, str]:
    return dead_letter_headers(
        {"ce-id": "1"},
        destination="http://sink/",
        status=status,
        response_headers=response_headers,
        response_body=body,
    )


def test_dead_letter_tells_destination_status_data_and_kne_headers() -> None:
    assert dead(422, {"Kne-Reason": "no", "X-Other": "y"}, b"x" * 2000) == {
        "ce-id": "1",
        "ce-knativeerrordest": "http://sink/",
        "ce-knativeerrorcode": "422",
        "ce-knativeerrordata": base64.b64encode(b"x" * 1024).decode(),
        "ce-reason": "no",
    }


def test_dead_letter_after_an_error_tells_only_the_destination() -> None:
    assert dead(None, {}, b"") == {
        "ce-id": "1",
        "ce-knativeerrordest": "http://sink/",
    }


def test_kne_header_with_a_hyphen_sticks_the_partition() -> None:
    with pytest.raises(StuckPartitionError):
        dead(500, {"kne-error-code": "1"}, b"")


# -- Statuses, backoff, merge ----------------------------------------------------------


@given(st.integers(200, 599))
def test_retried_are_404_408_409_429_and_from_500_on(status: int) -> None:
    assert is_retried(status) == (status in {404, 408, 409, 429} or status >= 500)
    assert is_success(status) == (status <= 299)


def test_linear_backoff_grows_by_its_delay() -> None:
    assert [backoff_s("linear", 2, n) for n in (1, 2, 3)] == [2, 4, 6]


def test_exponential_backoff_of_knatives_default_takes_ten_minutes() -> None:
    delays_s = [backoff_s("exponential", 0.3, n) for n in range(1, 11)]
    assert delays_s[0] == 0.6
    assert sum(delays_s) == pytest.approx(613.8)


@pytest.mark.parametrize(
    ("spec", "delivery"),
    [
        (None, Delivery(10, "exponential", 0.3, 600.0)),
        ({}, Delivery(retry=0)),
        ({"backoffDelay": "PT1S"}, Delivery(retry=0)),
        ({"timeout": "PT60S"}, Delivery(0, "exponential", 0.2, 60.0)),
        ({"retry": 3}, Delivery(3, "exponential", 0.2, 600.0)),
        (
            {"retry": 120, "backoffPolicy": "linear", "backoffDelay": "PT1S"},
            Delivery(120, "linear", 1.0, 600.0),
        ),
        (
            {"deadLetterSink": {"uri": "http://dls/"}},
            Delivery(0, "exponential", 0.2, 600.0, "http://dls/"),
        ),
    ],
)
def test_any_delivery_stanza_replaces_all_defaults(
    spec: dict[str, object] | None, delivery: Delivery
) -> None:
    assert Delivery.from_spec(spec) == delivery


def test_unknown_backoff_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="backoffPolicy"):
        Delivery.from_spec({"retry": 1, "backoffPolicy": "Linear"})


def test_backoff_of_nothing_means_no_repetition() -> None:
    assert Delivery(retry=5, backoff_delay_s=0).retry_effective == 0
    assert Delivery(retry=5).retry_effective == 5


def test_max_poll_interval_outlasts_the_chain_within_librdkafkas_limit() -> None:
    assert Delivery().max_poll_interval_ms == MAX_POLL_INTERVAL_MS_MAX
    assert Delivery(retry=5000).max_poll_interval_ms == MAX_POLL_INTERVAL_MS_MAX
    small = Delivery(retry=1, backoff_policy="linear", backoff_delay_s=1, timeout_s=1)
    assert small.max_poll_interval_ms == 2 * 50 * 4000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("PT0.2S", 0.2), ("PT60S", 60), ("PT1M", 60), ("PT1H1M1S", 3661), ("PT0S", 0)],
)
def test_duration_is_read(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "PT", "10s", "P1D", "PT-1S", "PT1S "])
def test_other_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        duration_s(text)
