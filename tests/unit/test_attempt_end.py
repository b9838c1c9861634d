"""The truth table of attempt_end.py, row by row and in every combination."""

from dataclasses import replace
from itertools import product

import pytest

from function.api_profile import Kind, load_profile
from function.attempt_end import (
    NEEDS_PERSON,
    NOT_EXECUTED_MAX,
    POSTPONED_S_MIN,
    Attempt,
    Way,
    end_of_attempt,
    way_out,
)
from function.circuit_breaker import PAUSE_S_MAX
from function.model import TRANSITIONS, Answer, AnswerClass, Entry, Outcome, Status
from tests.conftest import settings_of

DONE = Answer(AnswerClass.DONE, reference="R-1")
ACCEPTED = Answer(AnswerClass.ACCEPTED, reference="R-1")
NO = Answer(AnswerClass.NO)
UNKNOWN = Answer(AnswerClass.UNKNOWN)
SAME_REFERENCE = Answer(AnswerClass.SAME_REFERENCE)
NOT_SENT = Answer(AnswerClass.RETRY, is_sent=False)
TOO_MANY = Answer(AnswerClass.RETRY, http_status=429)
OURS = Answer(AnswerClass.OURS, http_status=401)
SAME_CONTENT = Answer(AnswerClass.SAME_CONTENT)
NOTHING_EXECUTED = (NOT_SENT, TOO_MANY, OURS, SAME_CONTENT)
ANSWERS = (DONE, ACCEPTED, NO, UNKNOWN, SAME_REFERENCE, *NOTHING_EXECUTED)

ATTEMPTS = [
    Attempt(kind, is_resolver, is_doubted, not_executed, may_find_out)
    for kind, is_resolver, is_doubted, not_executed, may_find_out in product(
        Kind, (False, True), (False, True), (0, NOT_EXECUTED_MAX), (False, True)
    )
]
FRESH = Attempt(
    Kind.REFUSE,
    is_resolver=False,
    is_doubted=False,
    not_executed=0,
    may_find_out=True,
)


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_end_is_a_legal_transition_and_bounded(answer: Answer) -> None:
    for attempt in ATTEMPTS:
        end = end_of_attempt(answer, attempt)

        assert end.status in TRANSITIONS[Status.IN_FLIGHT]
        assert 0 <= end.wait_s <= max(PAUSE_S_MAX, answer.retry_after_s)
        assert not end.needs_person or attempt.kind is Kind.NONE
        if attempt.is_resolver:
            # No record comes that would go on with one of these.
            assert end.status not in {Status.RELEASED, Status.IN_DOUBT}


@pytest.mark.parametrize(
    ("answer", "outcome", "status"),
    [
        (DONE, Outcome.SUCCEEDED, Status.SUCCEEDED),
        (ACCEPTED, Outcome.ACCEPTED, Status.ACCEPTED),
        (NO, Outcome.REJECTED, Status.REJECTED),
    ],
)
def test_final_answer_ends_any_order(
    answer: Answer, outcome: Outcome, status: Status
) -> None:
    assert {end_of_attempt(answer, attempt)[:2] for attempt in ATTEMPTS} == {
        (outcome, status)
    }


@pytest.mark.parametrize("answer", NOTHING_EXECUTED)
def test_doubt_is_sticky_whoever_tries_again(answer: Answer) -> None:
    doubted = [attempt for attempt in ATTEMPTS if attempt.is_doubted]

    assert {end_of_attempt(answer, attempt).status for attempt in doubted} == {
        Status.PARKED
    }


@pytest.mark.parametrize("answer", [UNKNOWN, SAME_REFERENCE])
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, Status.IN_DOUBT),
        ({"may_find_out": False}, Status.PARKED),
        ({"is_doubted": True}, Status.PARKED),
        ({"is_resolver": True}, Status.PARKED),
        ({"kind": Kind.NONE}, Status.PARKED),
    ],
)
def test_unknown_outcome_is_found_out_once_or_parked(
    answer: Answer, changes: dict[str, object], status: Status
) -> None:
    attempt = FRESH._replace(**changes)  # type: ignore[arg-type]

    end = end_of_attempt(answer, attempt)

    assert (end.outcome, end.status) == (Outcome.PARKED, status)
    assert end.needs_person == (attempt.kind is Kind.NONE)


def test_what_was_never_sent_waits_at_its_place_however_often() -> None:
    often = FRESH._replace(not_executed=100)

    assert end_of_attempt(NOT_SENT, often)[:3] == (
        Outcome.RELEASED,
        Status.RELEASED,
        0,
    )
    assert end_of_attempt(NOT_SENT, often._replace(is_resolver=True))[:3] == (
        Outcome.RELEASED,
        Status.HELD,
        0,
    )


def test_answers_that_nothing_was_executed_are_counted_then_postponed() -> None:
    ends = [
        end_of_attempt(TOO_MANY, FRESH._replace(not_executed=before))
        for before in range(8)
    ]

    assert [end.outcome for end in ends] == [Outcome.RELEASED] * 2 + [
        Outcome.POSTPONED
    ] * 6
    assert [end.status for end in ends] == [Status.RELEASED] * 2 + [Status.HELD] * 6
    waits = [end.wait_s for end in ends[2:]]
    assert waits[0] == POSTPONED_S_MIN
    assert waits == sorted(waits)
    assert waits[-1] == PAUSE_S_MAX


def test_wait_of_the_api_is_kept_at_the_head_only_up_to_the_longest_pause() -> None:
    short = replace(TOO_MANY, retry_after_s=PAUSE_S_MAX)
    long = replace(TOO_MANY, retry_after_s=PAUSE_S_MAX + 1)

    assert end_of_attempt(short, FRESH)[1:3] == (Status.RELEASED, PAUSE_S_MAX)
    assert end_of_attempt(long, FRESH)[1:3] == (Status.HELD, PAUSE_S_MAX + 1)


PROFILE = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
ENTRY = Entry(
    idempotency_key="app:r1",
    fingerprint="f" * 64,
    status=Status.IN_DOUBT,
    token="0" * 32,
    is_lease_over=True,
    rendered_key="app:r1",
    sent_age_s=10.0,
    first_sent_age_s=10.0,
    doubts=1,
    not_executed=0,
    wait_s=0.0,
    api_kind=None,
    api_identity=PROFILE.identity,
    last_class=AnswerClass.UNKNOWN,
    reference=None,
    reason="",
)


@pytest.mark.parametrize(
    ("kind", "after", "first_sent_age_s", "last_class", "way"),
    [
        (Kind.REPLAY, Kind.NONE, 0.0, "unknown", Way.REPEAT),
        (Kind.REPLAY, Kind.NONE, 3600.0 - 61.0, "unknown", Way.REPEAT),
        (Kind.REPLAY, Kind.NONE, 3600.0 - 60.0, "unknown", "cannot_be_found_out"),
        (Kind.REPLAY, Kind.REFUSE, 3600.0, "unknown", Way.LOOK_UP),
        (Kind.REPLAY, Kind.NONE, 0.0, "same_reference", Way.LOOK_UP),
        (Kind.REFUSE, Kind.NONE, 1e9, "unknown", Way.LOOK_UP),
        (Kind.LOOKUP, Kind.NONE, 1e9, "unknown", Way.LOOK_UP),
        (Kind.NONE, Kind.NONE, 0.0, "unknown", "cannot_be_found_out"),
    ],
)
def test_way_out_of_a_doubt_is_the_kinds(
    kind: Kind, after: Kind, first_sent_age_s: float, last_class: str, way: object
) -> None:
    profile = replace(
        PROFILE, kind=kind, kind_after_window=after, window_s=3600.0, settle_s=60.0
    )
    entry = replace(
        ENTRY,
        api_kind=kind,
        first_sent_age_s=first_sent_age_s,
        last_class=AnswerClass(last_class),
    )

    assert way_out(entry, profile) == way


@pytest.mark.parametrize(
    ("known", "reason"), [(None, "api_kind_unknown"), ("none", "api_kind_changed")]
)
def test_doubt_about_another_kind_of_api_is_a_persons_case(
    known: str | None, reason: str
) -> None:
    profile = replace(PROFILE, kind=Kind.REPLAY)

    assert way_out(replace(ENTRY, api_kind=known), profile) == reason
    assert reason in NEEDS_PERSON


@pytest.mark.parametrize("kind", [*Kind])
@pytest.mark.parametrize(
    ("known", "reason"),
    [(None, "api_identity_unknown"), ("generic@old", "api_of_another_identity")],
)
def test_doubt_about_another_api_is_a_persons_case(
    kind: Kind, known: str | None, reason: str
) -> None:
    profile = replace(PROFILE, kind=kind)
    entry = replace(ENTRY, api_kind=kind, api_identity=known)

    assert way_out(entry, profile) == reason
    assert reason in NEEDS_PERSON
