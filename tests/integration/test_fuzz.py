"""The fuzz can see: every bad server turns its judge red, and the search ends there.

Each bad server is one that a front door could become by one wrong line.
"""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import pytest
from rich.console import Console

from function.json_bound import has_too_many_values
from proof.bent_requests import (
    EVENT_BYTES_MAX,
    MARK,
    NUMBER_PREFIX,
    PLANTED_ERROR,
    Request,
    delivery_of,
    heaviest_orders,
    new_order,
    too_heavy_events,
)
from proof.door_judge import (
    FILES_MORE_MAX,
    Footprint,
    Found,
    judge_answer,
    judge_growth,
    judge_log,
    judge_peak,
    judge_silence,
)
from proof.door_stage import SOURCE, staged
from proof.examination import footprint_of
from proof.fuzz import replay, run, search, warm_up
from proof.pod_limits import memory_limit_kib
from proof.raw_client import Answer
from tests.processes import ROOT

WELL: Final = Footprint(rss_kib=80_000, files=30, threads=10)
BAD: Final = Request("bad", (b"x",), body=b"{")
CUT: Final = Request("cut", (b"x",), is_odd=True)


class Shown:
    """What a ledger and a book would show."""

    def __init__(self, *, executions: int = 1, quarantined: bytes = b"{") -> None:
        self._executions = executions
        self._quarantined = quarantined

    def is_quarantined(self, raw: bytes, outcome: str) -> bool:
        return (raw, outcome) == (self._quarantined, "malformed")

    def status_of(self, _key: str) -> str | None:
        return "succeeded"

    def executions(self, _key: str) -> int:
        return self._executions


def answer(status: int, body: object = b"", **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, headers, data, data)


def completion(order: dict[str, Any]) -> Answer:
    names = {name: order[name] for name in ("rechargeId", "channel")}
    kind = {"ce-type": "com.example.topup.succeeded.v1"}
    return answer(200, names, **kind)


MALFORMED: Final = {"outcome": "malformed", "reason": "body: is not JSON"}


# ---- the rules -----------------------------------------------------------------------


def test_documented_answers_are_well() -> None:
    order = new_order()
    judge_answer(delivery_of(order), completion(order), Shown())
    judge_answer(BAD, answer(400, MALFORMED), Shown())
    judge_answer(BAD, answer(503, {"outcome": "unknown_type"}), Shown())
    judge_answer(CUT, answer(503), Shown())
    judge_answer(Request("get", (b"x",), b"GET"), answer(404), Shown())
    judge_silence(CUT)


@pytest.mark.parametrize(
    ("request_", "given", "shown", "told"),
    [
        (BAD, answer(400, MALFORMED), Shown(quarantined=b""), "its bytes"),
        (BAD, answer(400, MALFORMED), Shown(quarantined=b"{}"), "its bytes"),
        (BAD, answer(400, b"<html>"), Shown(), "a page"),
        (BAD, answer(400), Shown(), "not documented"),
        (BAD, answer(422, MALFORMED), Shown(), "not documented"),
        (BAD, answer(500, MALFORMED), Shown(), "not documented"),
        (BAD, answer(500, b"Traceback (most"), Shown(), "a traceback"),
        (BAD, answer(308), Shown(), "not documented"),
        (BAD, answer(413, {"outcome": "too_large"}), Shown(), "within bounds"),
        (BAD, answer(503), Shown(), "empty 503"),
        (BAD, answer(503, {"outcome": "ledger_unavailable"}), Shown(), "not doc"),
        (BAD, answer(400, MALFORMED | {"x": MARK}), Shown(), "request held"),
        (BAD, answer(400, MALFORMED | {"x": "%2b41790123456"}), Shown(), "number"),
        (BAD, answer(400, MALFORMED, **{"kne-x": "1"}), Shown(), "Knative"),
        (BAD, answer(200), Shown(), "not documented"),
        (BAD, answer(503, {"outcome": "paused"}), Shown(), "every part is well"),
        (BAD, answer(409, {"outcome": "held", "reason": "x"}), Shown(), "more than"),
        (BAD, answer(200, {}), Shown(), "completion event"),
        (CUT, answer(400, MALFORMED), Shown(), "nobody knows"),
        (CUT, completion(new_order()), Shown(), "nobody knows"),
        (Request("put", (b"x",), b"PUT"), answer(405), Shown(), "answered 405"),
        (Request("put", (b"x",), b"PUT"), answer(200), Shown(), "answered 200"),
    ],
    ids=range(22),
)
def test_broken_rule_is_found(
    request_: Request, given: Answer, shown: Shown, told: str
) -> None:
    with pytest.raises(Found, match=told):
        judge_answer(request_, given, shown)


@pytest.mark.parametrize("executions", [0, 2])
def test_success_that_the_book_does_not_show_once_is_found(executions: int) -> None:
    order = new_order()

    with pytest.raises(Found, match=f"{executions} executions"):
        judge_answer(
            delivery_of(order), completion(order), Shown(executions=executions)
        )


def test_answer_of_another_order_is_found() -> None:
    """Pipelined requests: each gets its own, in order."""
    with pytest.raises(Found, match="another order's"):
        judge_answer(delivery_of(new_order()), completion(new_order()), Shown())


@pytest.mark.parametrize("status", [400, 404, 409, 422, 424, 503])
def test_good_order_that_is_not_executed_is_found(status: int) -> None:
    with pytest.raises(Found, match="good order"):
        judge_answer(delivery_of(new_order()), answer(status, MALFORMED), Shown())


def test_silence_at_a_readable_request_is_found() -> None:
    with pytest.raises(Found, match="not answered"):
        judge_silence(BAD)


@pytest.mark.parametrize(
    "line",
    [
        '{"action": "unforeseen", "error": "OverflowError"}',
        f'{{"note": "{MARK}"}}',
        f'{{"subscriber": "{NUMBER_PREFIX}123456"}}',
        '{"event_id": "41 79 123 45 67"}',
        '{"reason": "call again"}',
        '{"of_tomorrow": "1234567"}',
        "[2026-11-23 12:00:00 +0000] [7] [ERROR] Socket error processing request.",
        "Traceback (most recent call last):",
    ],
)
def test_log_line_that_tells_of_an_error_or_too_much_is_found(line: str) -> None:
    with pytest.raises(Found):
        judge_log(line, planted=1)


def test_planted_error_is_told_once_and_no_more() -> None:
    line = f'{{"action": "unforeseen", "error": "{PLANTED_ERROR}"}}'

    assert judge_log(line, planted=1) == 1
    with pytest.raises(Found, match="unforeseen"):
        judge_log(line, planted=0)


@pytest.mark.parametrize(
    "after",
    [
        Footprint(rss_kib=130_000, files=30, threads=10),
        Footprint(rss_kib=80_000, files=31 + FILES_MORE_MAX, threads=10),
        Footprint(rss_kib=80_000, files=30, threads=11),
    ],
)
def test_growth_is_found(after: Footprint) -> None:
    judge_growth(WELL, WELL)
    with pytest.raises(Found, match="grew"):
        judge_growth(WELL, after)


def test_memory_that_no_pod_has_is_found() -> None:
    judge_peak(replace(WELL, peak_kib=memory_limit_kib()))
    with pytest.raises(Found, match="a pod has"):
        judge_peak(replace(WELL, peak_kib=memory_limit_kib() + 1))


def test_heaviest_orders_are_orders() -> None:
    """One that is refused for its values would weigh nothing."""
    for request in heaviest_orders():
        assert request.body is not None
        assert 10_000 < len(request.body) <= EVENT_BYTES_MAX
        assert not has_too_many_values(request.body)
    for request in too_heavy_events():
        assert request.body is not None
        assert EVENT_BYTES_MAX * 0.9 < len(request.body) <= EVENT_BYTES_MAX
        assert has_too_many_values(request.body)


# ---- bad servers ---------------------------------------------------------------------

MAIN: Final = ROOT / "function" / "main.py"
#: What is wrong -> the text of main.py, and what stands there instead.
WRONG: Final = {
    "echoes": (
        "_refuse(outcome, str(error), headers, body",
        "_refuse(outcome, str(error) + repr(body), headers, body",
    ),
    "does not record": ("services().ledger.put_in_quarantine(refused)", "True"),
    "records no bytes": (
        "Refused(outcome, detail, raw, len(raw)",
        'Refused(outcome, detail, b"", len(raw)',
    ),
    "answers 500": ("STATUS[_unforeseen(request)]", "500"),
    "loses": (
        "services().processing.process(order)",
        'Receipt(Outcome.SUCCEEDED, reference="r")',
    ),
    "tells the log": ("key=order.idempotency_key", "key=order.msisdn"),
    "tells the log an id": ("event_id=order.event_id", "detail=order.event_id"),
    "answers a pause": ("if receipt.outcome in _REFUSED:", "if receipt.reason:"),
}


def source_with(directory: Path, old: str, new: str) -> Path:
    """The function with one wrong line, and the planted error as in the fuzz."""
    text = MAIN.read_text("utf-8")
    assert text.count(old) == 1, old
    main = directory / "wrong_main.py"
    main.write_text(text.replace(old, new), "utf-8")
    planted = SOURCE.read_text("utf-8")
    place = 'Path(__file__).resolve().parents[1] / "function" / "main.py"'
    assert planted.count(place) == 1
    source = directory / "planted_error.py"
    source.write_text(planted.replace(place, f"Path({str(main)!r})"), "utf-8")
    return source


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrong", WRONG)
def test_bad_server_is_found_and_the_find_can_be_replayed(
    tmp_path: Path, wrong: str
) -> None:
    source = source_with(tmp_path, *WRONG[wrong])
    with staged(tmp_path, "sqlite", source) as stage:
        # Many more than it takes: what shows the rarest is drawn once in hundreds.
        find = search(stage.examination, requests=8000, start=1)

        assert find is not None
        assert find.blob
        assert replay(stage.examination, find.blob) is not None


@pytest.mark.slow
def test_function_as_it_is_is_green(tmp_path: Path) -> None:
    with staged(tmp_path, "sqlite") as stage:
        warm_up(stage.examination)
        before = footprint_of(stage.function.worker)

        assert search(stage.examination, requests=400, start=2) is None
        stage.examination.finish(stage.function.worker, before)

        assert stage.evidence.executed >= len(stage.examination.orders) > 200
        assert stage.evidence.quarantined
        statuses = stage.examination.answered
        assert {200, 400, 503} <= set(statuses)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_red_run_says_how_to_repeat_it(tmp_path: Path) -> None:
    source = source_with(tmp_path, *WRONG["answers 500"])
    said = StringIO()

    is_green = run(
        tmp_path,
        "sqlite",
        requests=8000,
        start=3,
        blob="",
        console=Console(file=said, width=200),
        source=source,
    )

    assert not is_green
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert report["verdict"] == "red"
    assert "RED: 500" in said.getvalue()
    assert f"--replay '{report['replay']}'" in said.getvalue()
