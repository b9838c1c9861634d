"""The arithmetic of ordered delivery, and the words of `topup plan`."""

import json
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from function.cli import main
from function.durations import age_s, iso_s, shown
from function.plan import Load, make_plan

#: 100 orders a second of a quarter of a second each, by hand.
WORKED = Load(rate=100, api_latency_s=0.23, overhead_s=0.02)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words])


def test_worked_example() -> None:
    made = make_plan(replace(WORKED, backlog=9200))

    assert made.partitions_min == 25
    # Twice as many, rounded up to a multiple of 12.
    assert made.partitions == 60
    assert made.capacity == pytest.approx(240)
    assert made.subscriber_rate_max == pytest.approx(4)
    assert (made.pods, made.pods_max) == (4, 8)
    assert made.connections == 2 * 8 * 8
    # 8 threads do 32 a second, for 30 seconds.
    assert made.lag_threshold == 960
    assert made.lag_at_rest == 500
    # So the commits that come late ask for no more pods than the rate does.
    assert made.lag_at_rest / made.lag_threshold < made.pods
    # What is left over 100 a second is 140.
    assert made.backlog_drained_s == pytest.approx(9200 / 140)
    assert made.outage_hour_drained_s == pytest.approx(360_000 / 140)
    assert made.capacity_now is None


@pytest.mark.parametrize(
    ("partitions", "is_enough", "drains"),
    [(24, False, False), (26, False, True), (50, True, True)],
)
def test_partitions_that_are_there_are_judged(
    partitions: int, *, is_enough: bool, drains: bool
) -> None:
    made = make_plan(replace(WORKED, partitions_now=partitions, backlog=1))

    assert made.capacity_now == pytest.approx(partitions * 4)
    assert made.is_enough_now is is_enough
    assert (made.backlog_drained_s is not None) is drains


def test_fractions_make_no_partition_too_many() -> None:
    """0.1 * 3 is more than 0.3 to a computer."""
    load = Load(rate=30, api_latency_s=0.1, overhead_s=0, headroom=1.000_000_1)

    assert make_plan(replace(load, rate=20)).partitions_min == 2
    assert make_plan(load).partitions_min == 3


loads = st.builds(
    Load,
    # Three times of everything is still less than the most partitions.
    rate=st.floats(0.01, 150),
    api_latency_s=st.floats(0.001, 5),
    overhead_s=st.floats(0, 1),
    headroom=st.floats(1.01, 3),
    threads=st.integers(1, 64),
    drain_within_s=st.floats(6, 600),
    backlog=st.integers(0, 10**6),
    partitions_now=st.none() | st.integers(1, 500),
)


@given(loads)
def test_plan_carries_what_was_wished(load: Load) -> None:
    made = make_plan(load)

    assert made.partitions >= made.partitions_min >= 1
    assert made.capacity >= load.rate * load.headroom * (1 - 1e-6)
    # One partition fewer than the least would not do.
    assert (made.partitions_min - 1) / load.service_s <= load.rate
    # Every partition that is used has a thread, and no pod more than that is bought.
    used = load.partitions_now or made.partitions
    assert made.pods_max * load.threads >= used
    assert made.pods_max == 2 or (made.pods_max - 1) * load.threads < used
    assert 2 <= made.pods <= made.pods_max
    assert made.connections == 2 * made.pods_max * load.threads


@given(loads, st.floats(1.1, 3))
def test_more_orders_or_slower_calls_never_need_less(load: Load, factor: float) -> None:
    least = make_plan(load)

    for harder in (
        replace(load, rate=load.rate * factor),
        replace(load, api_latency_s=load.api_latency_s * factor),
    ):
        more = make_plan(harder)
        assert more.partitions >= least.partitions
        assert more.partitions_min >= least.partitions_min


@given(loads)
def test_backlog_is_gone_when_the_plan_says(load: Load) -> None:
    made = make_plan(load)
    capacity = made.capacity_now or made.capacity

    if made.backlog_drained_s is None:
        assert capacity <= load.rate
    else:
        worked_off = (capacity - load.rate) * made.backlog_drained_s
        assert math.isclose(worked_off, load.backlog, rel_tol=1e-6, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rate", "0", "--api-latency", "1"), "--rate 0: more than 0"),
        (("--rate", "nan", "--api-latency", "1"), "--rate nan"),
        (("--rate", "inf", "--api-latency", "1"), "--rate inf"),
        (("--rate", "-1", "--api-latency", "1"), "--rate -1"),
        (("--rate", "1", "--api-latency", "0"), "--api-latency 0"),
        (("--rate", "1", "--api-latency", "1", "--headroom", "1"), "--headroom 1"),
        (("--rate", "1", "--api-latency", "1", "--threads", "0"), "--threads 0"),
        (("--rate", "1", "--api-latency", "1", "--backlog", "-1"), "--backlog -1"),
        (("--rate", "1", "--api-latency", "1", "--partitions-now", "0"), "tions-now 0"),
        (("--rate", "1", "--api-latency", "1", "--overhead", "2h"), "--overhead"),
        (("--rate", "1", "--api-latency", "1", "--drain-within", "5s"), "--drain-with"),
        (("--rate", "99999", "--api-latency", "9"), "more than 10000 partitions"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(
    words: tuple[str, ...], told: str
) -> None:
    result = run(*words)

    assert result.exit_code == 1
    assert result.stderr.startswith("topup: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("rate", ["many", "5/week", "1/2/s", ""])
def test_rate_that_is_none_is_wrong_use(rate: str) -> None:
    assert run("--rate", rate, "--api-latency", "1").exit_code == 2
    assert run("--rate", "1", "--api-latency", "soon").exit_code == 2


@pytest.mark.parametrize("rate", ["120", "120/s", "7200/min", "432e3/h", "10368000/d"])
def test_rate_has_units(rate: str) -> None:
    result = run("--rate", rate, "--api-latency", "300ms", "--json")

    assert json.loads(result.stdout)["load"]["rate"] == pytest.approx(120)


def test_report_says_what_to_set_and_what_is_assumed() -> None:
    result = run(
        *("--rate", "100/s", "--api-latency", "230ms", "--backlog", "9200"),
        *("--partitions-now", "26"),
    )

    assert result.exit_code == 0
    rows = {line[:26].strip(): line[26:].split()[0] for line in _table(result)}
    assert rows["partitions"] == "60"
    assert rows["capacity of 26 now"] == "104/s"
    assert rows["pods, at most"] == "4"
    assert rows["backlog"] == "38.3"
    assert "not enough with this headroom" in result.stdout
    assert "Consumers of the KafkaSource add no capacity" in result.stdout


def _table(result: Result) -> list[str]:
    table, _, _ = result.stdout.partition("\n\n")
    return table.splitlines()


# -- Durations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("PT60S", 60),
        ("PT0.3S", 0.3),
        ("PT1M30S", 90),
        ("PT2H", 7200),
        ("P1DT1S", 86_401),
        ("P2D", 172_800),
        ("PT0S", 0),
        ("P", None),
        ("PT", None),
        ("P1DT", None),
        ("P1M", None),
        ("60s", None),
        ("-PT1S", None),
        ("", None),
        (None, None),
        (60, None),
    ],
)
def test_iso_duration(text: object, seconds: float | None) -> None:
    assert iso_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("250ms", 0.25),
        ("0.3", 0.3),
        ("15m", 900),
        ("36h", 129_600),
        ("44d", 3_801_600),
        ("m", None),
        ("-1s", None),
        ("1w", None),
        ("1e3", None),
    ],
)
def test_age(text: str, seconds: float | None) -> None:
    assert age_s(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (119, "119 s"), (120, "2 m"), (7200, "2 h"), (604_800, "7 d")],
)
def test_duration_is_shown_in_its_largest_unit(seconds: float, text: str) -> None:
    assert shown(seconds) == text
