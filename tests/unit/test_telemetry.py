"""Log lines: one JSON object a line, and nothing in it that is somebody's."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function import telemetry


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("topup")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    written = capsys.readouterr()
    assert written.out == ""
    found = [json.loads(line) for line in written.err.splitlines()]
    assert all(isinstance(line, dict) for line in found)
    return found


def test_line_is_one_json_object_with_its_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure("INFO")
    telemetry.log("delivery", key="app:1", outcome="succeeded", reference=None, n=3)

    (line,) = lines(capsys)
    assert line.pop("at")
    assert line == {
        "level": "INFO",
        "action": "delivery",
        "key": "app:1",
        "outcome": "succeeded",
        "n": 3,
    }


@pytest.mark.parametrize(
    "hostile", ['a"b', "a\nb", "a\r\n{}", "\u2028", "\0", "\ud800", "%s %d", "{0}"]
)
def test_no_field_breaks_the_line(
    capsys: pytest.CaptureFixture[str], hostile: str
) -> None:
    telemetry.configure("INFO")
    telemetry.log("delivery", detail=hostile, odd=object())

    (line,) = lines(capsys)
    assert line["detail"] == hostile


def test_line_is_written_once_however_often_it_is_configured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure("INFO")
    telemetry.configure("INFO")
    telemetry.log("delivery")

    assert len(lines(capsys)) == 1


def test_level_holds_back_what_is_below(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("warning")
    telemetry.log("delivery")
    telemetry.alert("parked", "app:1", "why")

    (line,) = lines(capsys)
    assert line["action"] == "parked"


def test_alert_is_marked_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure("INFO")
    telemetry.alert("parked", "app:1", "cannot_be_found_out")

    (line,) = lines(capsys)
    assert (line["alert"], line["level"]) == (True, "WARNING")
    assert (line["key"], line["reason"]) == ("app:1", "cannot_be_found_out")


def test_error_tells_class_and_place_and_never_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure("INFO")

    def inner() -> None:
        raise ValueError("Duplicate entry '+41791234567' for key 'PRIMARY'")

    try:
        inner()
    except ValueError as failure:
        telemetry.error("unforeseen", failure, path="/")

    written = capsys.readouterr().err
    line = json.loads(written)
    assert line["error"] == "ValueError"
    assert line["place"].startswith(f"{__name__}:")
    assert line["path"] == "/"
    assert "41791234567" not in written
    assert "Duplicate" not in written
    assert "Traceback" not in written


def test_error_that_was_never_raised_has_no_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure("INFO")
    telemetry.error("unforeseen", KeyError("secret"))

    (line,) = lines(capsys)
    assert (line["error"], line["place"]) == ("KeyError", "")


@pytest.mark.parametrize(
    "text",
    ["", "blocked", "http_503", "R-77", "partition:3/offset:1042", "a.b#c", "12/34-56"],
)
def test_foreign_text_that_can_be_nobodys_is_told_as_it_is(text: str) -> None:
    assert telemetry.foreign(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "1234567", "R-20261126-1", "41:79:123:45:67", "a b", "x" * 65, "caf\xe9",
        "\u0664\u0661", "a\nb", "+41", "\ud800", "{}", "<b>", "sha256:\u202e",
    ],
)  # fmt: skip
def test_other_foreign_text_is_told_as_its_hash_in_every_field(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    telemetry.configure("INFO")
    telemetry.log("delivery", event_id=text, of_tomorrow=text)
    telemetry.alert("parked", "app:1", text, reference=text)
    telemetry.error("unforeseen", KeyError(text), reference=text)

    for line in lines(capsys):
        told = [line[n] for n in ("event_id", "reference", "reason") if n in line]
        assert told
        assert all(re.fullmatch("sha256:[0-9a-f]{16}", each) for each in told)
        assert text not in map(str, line.values())


@given(text=st.text(max_size=80))
def test_foreign_text_is_never_a_number_or_a_sentence(text: str) -> None:
    shown = telemetry.foreign(text)

    assert " " not in shown
    assert shown.startswith("sha256:") or sum(map(str.isdigit, shown)) <= 6


def test_number_is_masked_but_for_its_ends() -> None:
    assert telemetry.mask("+41791234567") == "+41******567"
    assert telemetry.mask("+8613800138000") == "+86********000"


@given(digits=st.text("0123456789", max_size=15))
def test_whole_number_is_never_shown(digits: str) -> None:
    number = f"+{digits}"
    masked = telemetry.mask(number)

    assert len(masked) == len(number)
    assert "*" in masked
    assert sum(character != "*" for character in masked) <= 6
