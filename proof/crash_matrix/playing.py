"""One cell, played: from the first delivery to the last, with a death in between.

Owns the order of what happens, and the source: it delivers like the real one, each
record of a partition again until it is done with, and only then the next. It must never
judge, nor wait for luck: every wait is for a condition, with a deadline.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import requests

from demo.book import BookEntry
from demo.server_process import LOOPBACK
from proof.crash_matrix.cells import OF_LOOK_UP, Behaviour, Cell, Moment, expected
from proof.crash_matrix.ground import Ground, Rig, key_of
from proof.crash_matrix.judging import BYSTANDER, Observation, is_done
from proof.crash_matrix.lives import Life
from proof.crash_matrix.wires import (
    FIRST,
    SECOND,
    ApiWire,
    DatabaseWire,
    FrontWire,
    Tap,
    Trigger,
    Wire,
)

#: A cell takes about ten seconds; on two busy cores several times that.
_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.15
_TERMINAL: Final = frozenset({"succeeded", "rejected", "abandoned"})
_REQUEST_TIMEOUT_S: Final = 20.0
_SUBSCRIBER: Final = "+393331234567"
_TOPIC: Final = "recharge.orders"
#: Name -> subscriber, partition, offset.
_RECORDS: Final = {
    FIRST: (_SUBSCRIBER, 0, 1),
    SECOND: (_SUBSCRIBER, 0, 2),
    BYSTANDER: ("+393331111111", 1, 1),
}


class TookTooLong(Exception):
    """Something did not happen in time; says what."""


def play(cell: Cell, rig: Rig) -> Observation:
    """Play one cell to its end.

    Raises:
        LifeFailed: a process does not start or end.
        TookTooLong: a delivery never ended, or a resolver never came to its end.

    """
    began_s = time.monotonic()
    with rig.ground(cell) as ground:
        source = _Source(ground)
        if cell.boundary.victim == "function":
            killed, survivor = _kill_function(ground, source, cell.boundary.moment)
            ground.resolver()
            _deliver_the_rest(cell, source, survivor)
        else:
            killed, survivor = _kill_resolver(ground, source)
            source.bring(BYSTANDER, survivor.port)
        _wait_for_the_end(ground)
        # Once more, as a replay of the topic would.
        source.done |= set(_RECORDS)
        answers = {name: source.deliver(name, survivor.port) for name in _RECORDS}
        statuses = ground.statuses()
    # What had not ended yet may have done something up to now.
    entries = ground.api.book.entries()
    return Observation(
        was_killed=killed is not None,
        answer_at_death=killed[0] if killed else None,
        executed=[_name_of(e) for e in entries if e.entry == "executed"],
        calls=sum(e.entry == "called" and _name_of(e) == FIRST for e in entries),
        look_ups=sum(e.entry == "looked_up" for e in entries),
        statuses=statuses,
        answers={name: answer or 0 for name, answer in answers.items()},
        deliveries=dict(source.deliveries),
        seconds=round(time.monotonic() - began_s, 1),
    )


#: The answer to the delivery that died, if somebody died.
_Death = tuple[int | None] | None


def _kill_function(
    ground: Ground, source: "_Source", moment: Moment
) -> tuple[_Death, Life]:
    """Deliver the first order to a function that dies; returns who serves then."""
    ground.misbehave()
    with _victim(ground, moment, ground.function) as (victim, trigger, front):
        answer = source.deliver(FIRST, front.port)
        was_killed = trigger.is_sprung
        if was_killed:
            victim.wait_until_dead()
    # Else it has answered and is idle; whoever comes after it has no wires.
    victim.end()
    if is_done(answer):
        source.done.add(FIRST)
    return ((answer,) if was_killed else None), ground.function()


def _kill_resolver(ground: Ground, source: "_Source") -> tuple[_Death, Life]:
    """Let a resolver die at the order of which the source brings nothing more."""
    moment = ground.cell.boundary.moment
    if moment in OF_LOOK_UP:
        # A doubt: the function dies when it has called, and before it can say so.
        killed, function = _kill_function(ground, source, Moment.SETTLEMENT_UNSENT)
        if killed is None:
            raise TookTooLong("the function never came to its settlement")
        # What was to be refused is the call, not the question.
        ground.recover()
        source.deliver(SECOND, function.port)
    else:
        function = ground.function()
        ground.pause()
        source.deliver(FIRST, function.port)
        source.deliver(SECOND, function.port)
        ground.misbehave()
    with _victim(ground, moment, ground.resolver) as (victim, trigger, _):
        if moment not in OF_LOOK_UP:
            ground.resume()
        _wait_until(
            lambda: trigger.is_sprung or _is_at_its_end(ground),
            "the resolver came neither to the boundary nor to an end",
            ground,
        )
        if trigger.is_sprung:
            victim.wait_until_dead()
    was_killed = trigger.is_sprung
    victim.end()
    ground.resolver()
    return ((None,) if was_killed else None), function


def _deliver_the_rest(cell: Cell, source: "_Source", survivor: Life) -> None:
    """What the source has left, each partition in its order."""
    # While nobody listens at the API, everybody waits: that is an outage.
    is_outage = cell.behaviour is Behaviour.REFUSED
    if not is_outage:
        source.bring(BYSTANDER, survivor.port)
    source.bring(FIRST, survivor.port)
    source.bring(SECOND, survivor.port)
    if is_outage:
        source.bring(BYSTANDER, survivor.port)


@contextmanager
def _victim(
    ground: Ground, moment: Moment, start: Callable[..., Life]
) -> Iterator[tuple[Life, Trigger, Tap]]:
    """Whoever is to die, behind wires; also who delivers to it must use its tap."""
    trigger = Trigger(moment)
    loop, key = ground.rig.loop, key_of(FIRST)
    taps: list[Tap] = []

    def tapped(port: int, wire: Callable[[], Wire]) -> Tap:
        tap = Tap(trigger, port, wire)
        loop.run(tap.open())
        taps.append(tap)
        return tap

    def has_executed() -> bool:
        return key in ground.api.book.executions_by_key()

    try:
        database = tapped(ground.rig.server.port, lambda: DatabaseWire(trigger))
        api_port: int | None = None
        # A tap would accept what the API refuses.
        if not ground.is_refusing:
            api = tapped(ground.api.port, lambda: ApiWire(trigger, has_executed))
            api_port = api.port
        life = start(database_port=database.port, api_port=api_port)
        trigger.aim(life.kill)
        front = tapped(life.port, lambda: FrontWire(trigger))
        yield life, trigger, front
    finally:
        for tap in taps:
            loop.run(tap.close())


def _wait_for_the_end(ground: Ground) -> None:
    """Wait until nothing will change; what the ledger says then is judged."""
    with contextlib.suppress(TookTooLong):
        _wait_until(lambda: _is_at_its_end(ground), "", ground)


def _is_at_its_end(ground: Ground) -> bool:
    """Whether the ledger says what it must, or what it will never take back."""
    promised, found = expected(ground.cell), ground.statuses()
    wanted = {FIRST: promised.status, SECOND: promised.next_status}
    wrong = [name for name, status in wanted.items() if found.get(name) != status]
    return not wrong or any(found.get(name) in _TERMINAL for name in wrong)


def _wait_until(is_so: Callable[[], bool], what: str, ground: Ground) -> None:
    end_s = time.monotonic() + _TIMEOUT_S
    while not is_so():
        ground.recover_if_refused()
        if time.monotonic() > end_s or ground.rig.stopping.wait(_POLL_S):
            raise TookTooLong(what)


class _Source:
    """Delivers records as the Kafka source does."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        #: Every delivery, by name, until the record was done with.
        self.deliveries: Counter[str] = Counter()
        #: Records whose offset is committed.
        self.done: set[str] = set()

    def bring(self, name: str, port: int) -> None:
        """Deliver a record until it is done with.

        Raises:
            TookTooLong: it never is.

        """
        end_s = time.monotonic() + _TIMEOUT_S
        while name not in self.done:
            answer = self.deliver(name, port)
            if is_done(answer):
                self.done.add(name)
                return
            is_late = time.monotonic() > end_s
            if is_late or self._ground.rig.stopping.wait(_POLL_S):
                raise TookTooLong(f"{name} is answered {answer} for ever")
            self._ground.recover_if_refused()

    def deliver(self, name: str, port: int) -> int | None:
        """Deliver once; None if the connection ended without a response."""
        msisdn, partition, offset = _RECORDS[name]
        if name not in self.done:
            self.deliveries[name] += 1
        try:
            answer = requests.post(
                f"http://{LOOPBACK}:{port}/",
                json={
                    "rechargeId": name,
                    "channel": "app",
                    "msisdn": msisdn,
                    "amountMinor": 1000,
                    "currency": "EUR",
                    "requestedAt": "2026-11-23T10:00:00Z",
                },
                headers={
                    "ce-specversion": "1.0",
                    "ce-id": f"partition:{partition}/offset:{offset}",
                    "ce-source": "/apis/v1/namespaces/shop/kafkasources/"
                    f"recharge-source#{_TOPIC}",
                    "ce-type": "dev.knative.kafka.event",
                    "ce-knativekafkapartition": str(partition),
                    "ce-knativekafkaoffset": str(offset),
                },
                timeout=_REQUEST_TIMEOUT_S,
            )
        except requests.ConnectionError:
            return None
        return answer.status_code


def _name_of(entry: BookEntry) -> str:
    return entry.key.partition(":")[2]
