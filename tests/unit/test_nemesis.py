"""The schedule of faults: a function of its seed, and complete."""

import itertools

import pytest

from demo.faults import Fault
from proof.nemesis import (
    BURSTS,
    CONNECTIONS,
    PROCESSES,
    RECHARGE_API,
    WITH_LOOK_UP,
    schedule,
)

HOUR_S = 3600.0


def test_same_seed_plans_the_same_faults_at_the_same_seconds() -> None:
    assert schedule(7, HOUR_S, "replay") == schedule(7, HOUR_S, "replay")
    assert schedule(7, HOUR_S, "replay") != schedule(8, HOUR_S, "replay")


def test_longer_run_begins_like_the_shorter_one() -> None:
    short = schedule(7, 120.0, "replay")
    long = [each for each in schedule(7, HOUR_S, "replay") if each in short]

    assert long == short


@pytest.mark.parametrize("seed", range(20))
def test_every_fault_comes_in_a_run_of_some_minutes(seed: int) -> None:
    planned = {each.name for each in schedule(seed, 300.0, "replay")}

    assert planned == {*PROCESSES, *CONNECTIONS, *RECHARGE_API}


@pytest.mark.parametrize("seed", range(20))
def test_two_minutes_have_most_faults_of_processes(seed: int) -> None:
    planned = schedule(seed, 120.0, "replay")
    processes = {each.name for each in planned if each.track == "processes"}

    assert len(processes) >= len(PROCESSES) - 4


def test_faults_of_one_track_do_not_overlap_and_end_in_time() -> None:
    for track in ("processes", "connections", "recharge_api"):
        mine = [each for each in schedule(3, HOUR_S, "replay") if each.track == track]

        assert all(
            before.at_s + before.lasts_s < after.at_s
            for before, after in itertools.pairwise(mine)
        )
        assert mine[-1].at_s + mine[-1].lasts_s < HOUR_S


def test_look_ups_fail_only_where_the_api_can_be_asked() -> None:
    for kind, can_be_asked in (("replay", False), ("none", False), ("lookup", True)):
        planned = {each.name for each in schedule(1, HOUR_S, kind)}

        assert (planned >= set(WITH_LOOK_UP)) is can_be_asked


def test_every_fault_of_the_api_that_the_issue_names_is_there() -> None:
    assert {
        Fault.ERROR_BEFORE,
        Fault.ERROR_AFTER,
        Fault.EXECUTE_THEN_DROP,
        Fault.HANG,
        Fault.RATE_LIMITED,
        Fault.EXECUTE_THEN_LATE,
        Fault.HALF_BODY,
    } <= set(BURSTS)
    assert {"outage", "subscriber_poisoned_by_error_before"} <= set(RECHARGE_API)
