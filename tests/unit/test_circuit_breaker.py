"""When the breaker lets an order be called, told step by step on a clock of its own."""

from typing import Any

import pytest

from function.circuit_breaker import (
    FAILING_MAX,
    PAUSE_S_MAX,
    PAUSE_S_MIN,
    CircuitBreaker,
    Permit,
)


class Clocked:
    """A breaker with a clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.alerts: list[tuple[str, str]] = []
        self.breaker = CircuitBreaker(self._alert)

    def _alert(self, action: str, _key: str, reason: str, **_fields: Any) -> None:
        self.alerts.append((action, reason))

    def permit(self) -> Permit:
        return self.breaker.permit(self.now)

    def fail(self, subscriber: str, retry_after_s: float = 0.0) -> None:
        with self.permit() as permit:
            assert permit
            permit.failed(subscriber, "timeout", self.now, retry_after_s)

    def answer(self) -> None:
        with self.permit() as permit:
            assert permit
            permit.answered()

    def open(self, retry_after_s: float = 0.0) -> None:
        for number in range(FAILING_MAX):
            self.fail(f"s{number}", retry_after_s)


@pytest.fixture
def clocked() -> Clocked:
    return Clocked()


def test_opens_when_three_subscribers_fail_in_a_row(clocked: Clocked) -> None:
    clocked.fail("a")
    clocked.fail("b")
    assert clocked.permit()

    clocked.fail("c")

    assert not clocked.permit()
    assert clocked.alerts == [("circuit_opened", "timeout")]


def test_one_subscriber_counts_once_however_often_it_fails(clocked: Clocked) -> None:
    for _ in range(10 * FAILING_MAX):
        clocked.fail("poisoned")
    clocked.fail("b")

    assert clocked.permit()
    assert clocked.alerts == []


def test_final_answer_starts_the_count_anew(clocked: Clocked) -> None:
    for number in range(10 * FAILING_MAX):
        clocked.fail(f"a{number}")
        clocked.fail(f"b{number}")
        clocked.answer()

    assert clocked.permit()
    assert clocked.alerts == []


def test_pause_is_doubled_by_each_failed_trial_up_to_the_longest(
    clocked: Clocked,
) -> None:
    clocked.open()
    pause_s = PAUSE_S_MIN
    pauses: list[float] = []
    while len(pauses) < 10:
        clocked.now += pause_s - 0.001
        assert not clocked.permit()
        clocked.now += 0.002
        clocked.fail("trial")
        pauses.append(pause_s)
        pause_s = min(2 * pause_s, PAUSE_S_MAX)

    assert pauses[-1] == PAUSE_S_MAX
    assert clocked.alerts == [("circuit_opened", "timeout")]


def test_one_order_alone_is_the_trial(clocked: Clocked) -> None:
    clocked.open()
    clocked.now += PAUSE_S_MIN

    with clocked.permit() as trial:
        assert trial
        clocked.now += 10 * PAUSE_S_MAX
        assert not clocked.permit()


def test_trial_that_was_not_made_is_free_for_the_next(clocked: Clocked) -> None:
    """The order turned out to be a repetition, or its delivery raised."""
    clocked.open()
    clocked.now += PAUSE_S_MIN

    def deliver() -> None:
        with clocked.permit() as trial:
            assert trial
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        deliver()

    assert clocked.permit()


def test_final_answer_of_the_trial_closes_it(clocked: Clocked) -> None:
    clocked.open()
    clocked.now += PAUSE_S_MIN
    clocked.answer()

    with clocked.permit() as one, clocked.permit() as other:
        assert one
        assert other
    assert clocked.alerts == [
        ("circuit_opened", "timeout"),
        ("circuit_closed", "answered"),
    ]


def test_final_answer_to_a_call_from_before_closes_it(clocked: Clocked) -> None:
    early = clocked.permit()
    clocked.open()
    assert not early

    early.answered()

    assert clocked.permit()


def test_permit_from_before_is_none_once_it_opens(clocked: Clocked) -> None:
    early = clocked.permit()
    assert early

    clocked.open()

    assert not early


def test_pause_starts_short_again_after_it_was_closed(clocked: Clocked) -> None:
    clocked.open()
    for _ in range(6):
        clocked.now += PAUSE_S_MAX
        clocked.fail("trial")
    clocked.now += PAUSE_S_MAX
    clocked.answer()
    clocked.open()

    clocked.now += PAUSE_S_MIN

    assert clocked.permit()


@pytest.mark.parametrize(
    ("named_s", "waited_s"), [(20.0, 20.0), (3_600.0, PAUSE_S_MAX), (0.2, PAUSE_S_MIN)]
)
def test_wait_that_the_api_names_is_kept_up_to_the_longest(
    clocked: Clocked, named_s: float, waited_s: float
) -> None:
    clocked.open(named_s)

    clocked.now += waited_s - 0.001
    assert not clocked.permit()
    clocked.now += 0.002
    assert clocked.permit()


def test_call_from_before_that_is_told_to_wait_lengthens_the_pause(
    clocked: Clocked,
) -> None:
    early = clocked.permit()
    clocked.open()

    early.failed("late", "status_429", clocked.now, 30)

    clocked.now += 29.0
    assert not clocked.permit()
    clocked.now += 1.0
    assert clocked.permit()
