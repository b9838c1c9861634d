"""The nemesis: a schedule of faults from a seed, and its execution on a cluster.

Owns which fault comes when, and that each is ended again; must never touch the topic,
the book or the ledger's content: it breaks the parts and what is between them.

    schedule(seed, seconds)   the same seed: the same faults at the same seconds
    Nemesis                   three tracks at once: processes, connections, recharge API

Each track draws from a shuffled deck, so every fault comes once before any comes again.
What is not repeatable is which record a fault meets, and how long a restart takes.
"""

import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeVar

from demo.faults import Fault, Script
from proof.cluster import LEASE_S, PODS, RESOLVERS, SOURCES, THIRD_SOURCE, Cluster
from proof.tcp_proxy import Weather

T = TypeVar("T")
Track = Literal["processes", "connections", "recharge_api"]
#: Least and most seconds.
Span = tuple[float, float]

_LOG = logging.getLogger(__name__)
#: Nothing happens before.
_CALM_S: Final = 3.0
#: Between two faults of one track.
_PAUSE_S: Final[Mapping[Track, Span]] = {
    "processes": (2.0, 6.0),
    "connections": (1.0, 4.0),
    "recharge_api": (1.0, 4.0),
}
_PAST_LEASE: Final[Span] = (LEASE_S + 0.5, LEASE_S + 3.0)
_MOMENT: Final[Span] = (0.0, 0.0)

PROCESSES: Final[Mapping[str, Span]] = {
    "function_killed": (0.5, 3.0),
    "function_restarted": _MOMENT,
    "function_paused": (0.5, LEASE_S - 0.5),
    "function_paused_past_lease": _PAST_LEASE,
    "function_skewed_and_paused": _PAST_LEASE,
    "source_killed": (0.5, 3.0),
    "source_paused_past_session": (4.0, 7.0),
    "source_added_and_removed": (5.0, 10.0),
    "resolver_killed": (0.5, 3.0),
    "resolver_paused_past_lease": _PAST_LEASE,
    "database_killed": _MOMENT,
    "database_failover": _MOMENT,
    "database_failover_of_a_frozen_one": _MOMENT,
    "database_paused": (0.5, 3.0),
    "replica_paused": (0.5, 3.0),
    "broker_killed": _MOMENT,
    "broker_paused": (0.5, 3.0),
}
PAIRS: Final = (
    "source->kafka",
    "source->function",
    "function->database",
    "function->api",
    "resolver->database",
    "resolver->api",
)
_WEATHERS: Final[Mapping[str, Span]] = {
    "cut": _MOMENT,
    "refused": (0.5, 2.0),
    "slow": (2.0, 5.0),
    "requests_stalled": (0.5, 5.0),
    "answers_stalled": (0.5, 5.0),
}
CONNECTIONS: Final[Mapping[str, Span]] = {
    f"{weather} {pair}": span for weather, span in _WEATHERS.items() for pair in PAIRS
}
#: Kinds of faults of the API that spoil the next few requests, whoever makes them.
BURSTS: Final = (
    Fault.ERROR_BEFORE,
    Fault.ERROR_AFTER,
    Fault.DROP_BEFORE,
    Fault.EXECUTE_THEN_DROP,
    Fault.EXECUTE_THEN_LATE,
    Fault.LATE_EXECUTE,
    Fault.HANG,
    Fault.DRIP,
    Fault.HALF_BODY,
    Fault.GARBAGE,
    Fault.RATE_LIMITED,
    Fault.SAME_CONTENT,
    Fault.UNAUTHORIZED,
    Fault.REDIRECT,
    Fault.REJECT,
)
#: What one subscriber's every request meets.
POISONS: Final = (Fault.ERROR_BEFORE, Fault.ERROR_AFTER, Fault.HANG)
RECHARGE_API: Final[Mapping[str, Span]] = {
    **{f"burst_of_{fault}": (1.0, 3.0) for fault in BURSTS},
    **{f"subscriber_poisoned_by_{fault}": (4.0, 8.0) for fault in POISONS},
    "outage": (0.5, 4.0),
}
#: Only where the API can be asked: there accepted recharges end, and look-ups fail.
WITH_LOOK_UP: Final[Mapping[str, Span]] = {
    "burst_of_accept": (1.0, 3.0),
    "burst_of_accept_then_fail": (1.0, 3.0),
    "look_ups_fail": (1.0, 3.0),
}
_BURST_MAX: Final = 12
#: The most wanted subscribers: a poison that nobody meets is none.
_POISONED_OF: Final = 20


@dataclass(frozen=True, slots=True)
class Incident:
    """A planned fault."""

    #: Seconds after the start; later when the one before it has taken longer.
    at_s: float
    track: Track
    name: str
    #: Seconds that it lasts, restarts apart.
    lasts_s: float
    #: Chooses among several victims, 0 to 1.
    pick: float


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault as it took place; seconds after the start."""

    name: str
    track: Track
    victim: str
    began_s: float
    ended_s: float


def schedule(seed: int, seconds: float, kind: str) -> list[Incident]:
    """All faults of a run, by time; a function of its arguments alone."""
    has_look_up = kind in {"refuse", "lookup"}
    decks: dict[Track, Mapping[str, Span]] = {
        "processes": PROCESSES,
        "connections": CONNECTIONS,
        "recharge_api": {**RECHARGE_API, **(WITH_LOOK_UP if has_look_up else {})},
    }
    incidents: list[Incident] = []
    for track, deck in decks.items():
        chance = random.Random(f"{seed}:{track}")  # noqa: S311 # not for secrets.
        incidents += _draw(chance, track, deck, seconds)
    return sorted(incidents, key=lambda each: each.at_s)


def _draw(
    chance: random.Random, track: Track, deck: Mapping[str, Span], seconds: float
) -> Iterator[Incident]:
    at_s, left = _CALM_S, list[str]()
    while True:
        at_s += chance.uniform(*_PAUSE_S[track])
        if not left:
            left = sorted(deck)
            chance.shuffle(left)
        name = left.pop()
        lasts_s = chance.uniform(*deck[name])
        if at_s + lasts_s >= seconds:
            return
        yield Incident(
            round(at_s, 2), track, name, round(lasts_s, 2), round(chance.random(), 4)
        )
        at_s += lasts_s


class Nemesis:
    """Carries a schedule out; a context manager that starts it, and ends every fault.

    Args:
        cluster: what is broken.
        incidents: from `schedule`.
        subscribers: whom a poison may hit, the most wanted first.

    """

    def __init__(
        self,
        cluster: Cluster,
        incidents: Sequence[Incident],
        subscribers: Sequence[str],
    ) -> None:
        self._cluster = cluster
        self._subscribers = subscribers[:_POISONED_OF]
        self._incidents = incidents
        self._began_s = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._happened: list[Happened] = []
        self._running: dict[Track, Happened] = {}
        #: What kept a fault from being ended: the run is worth nothing then.
        self.failure: Exception | None = None
        self._threads = [
            threading.Thread(
                target=self._play, args=(track,), name=f"nemesis-{track}", daemon=True
            )
            for track in _PAUSE_S
        ]

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Begin no fault any more, and end those that run."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def happened(self) -> list[Happened]:
        """Every fault that has ended."""
        with self._lock:
            return sorted(self._happened, key=lambda each: each.began_s)

    def running(self) -> list[Happened]:
        """Every fault that goes on."""
        with self._lock:
            return list(self._running.values())

    def counts(self) -> dict[str, int]:
        """How often each fault took place."""
        return dict(sorted(Counter(each.name for each in self.happened()).items()))

    def _play(self, track: Track) -> None:
        for incident in self._incidents:
            if incident.track != track:
                continue
            if self._over.wait(max(0.0, incident.at_s - self._elapsed_s())):
                return
            try:
                self._take_place(incident)
            except Exception as error:  # noqa: BLE001 # a thread's only way to say it.
                _LOG.exception("%s failed", incident.name)
                self.failure = error
                return

    def _take_place(self, incident: Incident) -> None:
        deeds: dict[Track, Callable[[Incident], contextlib.AbstractContextManager[str]]]
        deeds = {
            "processes": self._process,
            "connections": self._connection,
            "recharge_api": self._recharge_api,
        }
        began_s = self._elapsed_s()
        track = incident.track
        now = Happened(incident.name, track, "", began_s, began_s)
        with self._lock:
            self._running[track] = now
        try:
            with deeds[track](incident) as victim:
                _LOG.info("%.1f s: %s %s", began_s, incident.name, victim)
                self._over.wait(incident.lasts_s)
        finally:
            with self._lock:
                del self._running[track]
        ended = Happened(incident.name, track, victim, began_s, self._elapsed_s())
        with self._lock:
            self._happened.append(ended)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    # -- Processes -------------------------------------------------------------------

    @contextlib.contextmanager
    def _process(self, incident: Incident) -> Iterator[str]:
        """Do it; what comes after the yield ends it."""
        cluster, name = self._cluster, incident.name
        kind = name.partition("_")[0]
        if kind in {"database", "replica", "broker"}:
            with self._server(incident):
                yield kind
            return
        victims = {"function": PODS, "resolver": RESOLVERS, "source": SOURCES}[kind]
        victim = _chosen(victims, incident.pick)
        if name == "source_added_and_removed":
            cluster.start_part(THIRD_SOURCE)
            yield THIRD_SOURCE
            cluster.end_part(THIRD_SOURCE, is_killed=False)
        elif "skewed" in name:
            cluster.end_part(victim, is_killed=True)
            cluster.start_part(victim, clock_skew_s=_skew_s(incident.pick))
            with _paused(cluster, victim):
                yield victim
        elif "paused" in name:
            with _paused(cluster, victim):
                yield victim
        else:
            cluster.end_part(victim, is_killed=name.endswith("_killed"))
            yield victim
            cluster.start_part(victim)

    @contextlib.contextmanager
    def _server(self, incident: Incident) -> Iterator[None]:
        cluster, name = self._cluster, incident.name
        database, broker = cluster.database, cluster.broker
        if name.endswith("_paused"):
            server = {
                "database_paused": database.primary,
                "replica_paused": database.replica,
                "broker_paused": broker,
            }[name]
            server.pause()
            try:
                yield
            finally:
                server.resume()
            return
        if name == "database_killed":
            database.crash_primary()
        elif name == "broker_killed":
            broker.kill()
            broker.start()
        else:
            database.fail_over(
                cluster.lead_to_primary, is_frozen=name.endswith("_frozen_one")
            )
        yield

    # -- Connections -------------------------------------------------------------------

    @contextlib.contextmanager
    def _connection(self, incident: Incident) -> Iterator[str]:
        weather, _, pair = incident.name.partition(" ")
        links = self._cluster.links(pair)
        link = _chosen(links, incident.pick)
        if weather == "cut":
            link.cut()
            yield link.name
            return
        link.set_weather(
            {
                "refused": Weather(is_refused=True),
                "slow": Weather(delay_s=0.01 + 0.1 * incident.pick),
                "requests_stalled": Weather(are_requests_stalled=True),
                "answers_stalled": Weather(are_answers_stalled=True),
            }[weather]
        )
        try:
            yield link.name
        finally:
            link.heal()

    # -- The recharge API --------------------------------------------------------------

    @contextlib.contextmanager
    def _recharge_api(self, incident: Incident) -> Iterator[str]:
        api, name = self._cluster.api, incident.name
        victim = "all"
        if name == "outage":
            api.refuse_connections(incident.lasts_s)
        elif name == "look_ups_fail":
            api.misbehave(Script(Fault.ERROR_BEFORE, times=None, on="lookup"))
        elif name.startswith("subscriber_poisoned_by_"):
            victim = _chosen(self._subscribers, incident.pick)
            fault = Fault(name.removeprefix("subscriber_poisoned_by_"))
            api.misbehave(Script(fault, times=None, msisdn=victim))
        else:
            times = 1 + round(incident.pick * (_BURST_MAX - 1))
            # Of a drip each byte takes so long: whole answers would take minutes.
            fault = Fault(name.removeprefix("burst_of_"))
            delay_s = 0.05 if fault is Fault.DRIP else None
            api.misbehave(Script(fault, times=times, delay_s=delay_s))
        try:
            yield victim
        finally:
            api.forget_scripts()
            if name == "outage":
                api.refuse_connections(0)


def _chosen(victims: Sequence[T], pick: float) -> T:
    return victims[min(int(pick * len(victims)), len(victims) - 1)]


def _skew_s(pick: float) -> float:
    """Up to three days ahead or behind, and never nearly right."""
    day_s = 24 * 3600.0
    return (1 if pick < 1 / 2 else -1) * (3600.0 + pick * 3 * day_s)


@contextlib.contextmanager
def _paused(cluster: Cluster, victim: str) -> Iterator[None]:
    part = cluster.part(victim)
    part.pause()
    try:
        yield
    finally:
        part.resume()
