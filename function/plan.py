"""`topup plan`: partitions, pods and threads for a wished rate.

Owns the arithmetic of ordered delivery, all pure; must never pretend to know what was
not measured: each number that is assumed is an argument.

In ordered mode one record of a partition is under way at a time, so a partition does
1 / (seconds an order takes) orders a second, and the partitions are all the parallelism
there is, however many consumers, pods or threads stand behind them.
"""

import math
from dataclasses import dataclass
from typing import Final

from function.errors import OperationRefused

#: The dispatcher commits offsets so often; what is done but not committed is lag.
COMMIT_INTERVAL_S: Final = 5.0
#: Even steps for KEDA, and room to spread over brokers.
_PARTITIONS_STEP: Final = 12
_SMALL_NUMBERS: Final = (1, 2, 3, 4, 6, 12)
#: A pod's node may die: one is no number for money.
_PODS_MIN: Final = 2
_PARTITIONS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is wished, and what is known or assumed about the parts."""

    #: Orders a second, at the peak.
    rate: float
    #: Mean time of one call of the recharge API, in seconds.
    api_latency_s: float
    #: Mean time of everything else: source, HTTP, two round trips to the database.
    overhead_s: float = 0.02
    #: Capacity over rate: what catches up, and what uneven keys cost.
    headroom: float = 2.0
    #: SERVER_THREADS.
    threads: int = 8
    #: How long the lag of one pod's worth may take to work off, in seconds.
    drain_within_s: float = 30.0
    #: Orders that wait already.
    backlog: int = 0
    partitions_now: int | None = None

    def check(self) -> None:
        """Refuse what has no meaning.

        Raises:
            OperationRefused: names the option and its bounds.

        """
        bounds = (
            ("--rate", self.rate, 0.0, 1e6, "orders a second"),
            ("--api-latency", self.api_latency_s, 0.0, 600.0, "seconds"),
            ("--headroom", self.headroom, 1.0, 100.0, "times the rate"),
            ("--drain-within", self.drain_within_s, COMMIT_INTERVAL_S, 86_400.0, "s"),
        )
        for name, value, low, high, unit in bounds:
            if not low < value <= high:
                raise OperationRefused(
                    f"{name} {value:g}: more than {low:g} and at most {high:g} {unit}"
                )
        whole = (
            ("--threads", self.threads, 1, 1000),
            ("--backlog", self.backlog, 0, 10**12),
            ("--partitions-now", _or_one(self.partitions_now), 1, _PARTITIONS_MAX),
        )
        for name, count, least, most in whole:
            if not least <= count <= most:
                raise OperationRefused(f"{name} {count}: from {least} to {most}")
        if not 0 <= self.overhead_s <= 60:  # noqa: PLR2004
            raise OperationRefused("--overhead: from 0 to 60 seconds")
        if self.rate * self.service_s * self.headroom > _PARTITIONS_MAX:
            raise OperationRefused(
                f"more than {_PARTITIONS_MAX} partitions: one ordered topic can't "
                "carry this; shorten the call"
            )

    @property
    def service_s(self) -> float:
        """For how long one order holds its partition."""
        return self.api_latency_s + self.overhead_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to set; every number follows from a Load."""

    #: With which the rate is just reached.
    partitions_min: int
    #: With headroom, rounded up to a number with many divisors.
    partitions: int
    #: Orders a second with these partitions.
    capacity: float
    #: One subscriber's orders a second, whatever is scaled.
    subscriber_rate_max: float
    pods: int
    pods_max: int
    connections: int
    #: KEDA's, where it scales the function's Deployment.
    lag_threshold: int
    #: Lag at the wished rate although nothing waits: done, not yet committed.
    lag_at_rest: int
    #: Until the backlog is gone, while orders go on to come; None: never.
    backlog_drained_s: float | None
    #: Until an hour's outage of the API is worked off; None: never.
    outage_hour_drained_s: float | None
    #: With the partitions that there are; None when nothing was said about them.
    capacity_now: float | None
    is_enough_now: bool | None


def make_plan(load: Load) -> Plan:
    """Do the arithmetic.

    Raises:
        OperationRefused: an argument is out of its bounds.

    """
    load.check()
    # Binary fractions: 100 * 0.05 must not become 6 partitions.
    least = max(1, math.ceil(round(load.rate * load.service_s, 9)))
    wished = math.ceil(round(load.rate * load.service_s * load.headroom, 9))
    partitions = _round_up(max(least, wished))
    capacity = partitions / load.service_s
    used = partitions if load.partitions_now is None else load.partitions_now
    used_capacity = used / load.service_s
    pods_max = max(_PODS_MIN, math.ceil(used / load.threads))
    # So many hold the partitions that the rate keeps busy.
    busy = math.ceil(round(load.rate * load.service_s, 9) / load.threads)
    pods = min(pods_max, max(_PODS_MIN, busy))
    # A pod can't do more at once than it has threads, or than there are partitions.
    pod_rate = min(load.threads, used) / load.service_s
    return Plan(
        partitions_min=least,
        partitions=partitions,
        capacity=capacity,
        subscriber_rate_max=1 / load.service_s,
        pods=pods,
        pods_max=pods_max,
        # Twice, because the old revision's pods are there while the new one's come.
        connections=2 * pods_max * load.threads,
        lag_threshold=max(1, math.floor(pod_rate * load.drain_within_s)),
        lag_at_rest=math.ceil(load.rate * COMMIT_INTERVAL_S),
        backlog_drained_s=_drained(load.backlog, load.rate, used_capacity),
        outage_hour_drained_s=_drained(load.rate * 3600, load.rate, used_capacity),
        capacity_now=None if load.partitions_now is None else used_capacity,
        is_enough_now=None
        if load.partitions_now is None
        else load.partitions_now >= max(least, wished),
    )


def _or_one(count: int | None) -> int:
    return 1 if count is None else count


def _round_up(partitions: int) -> int:
    for each in _SMALL_NUMBERS:
        if partitions <= each:
            return each
    return math.ceil(partitions / _PARTITIONS_STEP) * _PARTITIONS_STEP


def _drained(backlog: float, rate: float, capacity: float) -> float | None:
    if backlog == 0:
        return 0.0
    return backlog / (capacity - rate) if capacity > rate else None
