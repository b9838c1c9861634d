"""The resolver: settles by look-up what can be settled, and runs what was held.

Owns when an order that nobody else will bring on is taken up; must never decide about
an answer or change a row itself: it goes through the same `Processing` and the same
claim protocol as the function, so any number of resolvers and pods may race.

    run       until it is told to stop
    run_once  one round over what is due

Each round: parked orders that the API can be asked about, held ones that are first in
their subscriber's line, claims whose lease is over, orders on which the source has
given up, accepted ones up to their end, and succeeded ones that may be taken back.
Several subscribers are brought on at a time, each in its own order. While the circuit
breaker is open a round makes no call and ends.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from function import telemetry
from function.api_auth import make_authenticator
from function.api_profile import ApiProfile, Kind, load_profile
from function.attempt_end import DEFINITE, why_not_ours
from function.circuit_breaker import Permit
from function.config import Settings
from function.database import make_engine
from function.errors import EventError, LedgerUnavailable
from function.events import restore_topup
from function.ledger import Ledger
from function.model import (
    Answer,
    AnswerClass,
    Entry,
    Finding,
    LookUp,
    Outcome,
    Status,
    Stored,
    TopUp,
)
from function.processing import Processing, RechargeApiPort
from function.recharge_api import RechargeApi

#: What one round counts, by outcome.
Counts = Counter[str]

#: Brings on several subscribers: one after the other (`map`), or by threads.
MapLines = Callable[[Callable[[Stored], Counts], Iterable[Stored]], Iterable[Counts]]

#: The most orders of one kind in a round; the rest comes in the next.
_BATCH: Final = 1_000

_SETTLED: Final = frozenset(
    {Outcome.SUCCEEDED, Outcome.ACCEPTED, Outcome.REJECTED, Outcome.ABANDONED}
)
#: In these a record brings an order on, unless it comes no more.
_BROUGHT_BY_RECORDS: Final = frozenset({Status.IN_DOUBT, Status.RELEASED})
#: Why an accepted order needs a person.
_TOLD: Final = frozenset({"accepted_overdue", "accepted_but_absent"})


class Resolver:
    """Brings on what the source will not.

    Args:
        ledger: finds what is due.
        processing: brings an order on; made with `is_resolver=True`.
        api: asked how accepted recharges end.
        profile: whether the API can be asked at all.
        given_up_s: age in seconds of the last change after which the source must have
            given up: its longest backoff plus its timeout.
        again_s: seconds before an order is looked up again.
        watch_s: seconds for which a recharge that was accepted is watched for a late
            reversal after its success.
        accepted_max_s: seconds after which an accepted recharge without an end is a
            person's case.
        is_stopping: true once no new order may be taken up.
        alert: told of what a person must look at.
        map_lines: runs a function over subscribers' orders, perhaps several at once.
        monotonic: the process's clock, in seconds.

    """

    def __init__(
        self,
        ledger: Ledger,
        processing: Processing,
        api: RechargeApiPort,
        profile: ApiProfile,
        *,
        given_up_s: float,
        again_s: float,
        watch_s: float,
        accepted_max_s: float,
        is_stopping: Callable[[], bool] = lambda: False,
        alert: Callable[..., None] = telemetry.alert,
        map_lines: MapLines = map,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._processing = processing
        self._api = api
        self._profile = profile
        self._given_up_s = given_up_s
        self._again_s = again_s
        self._watch_s = watch_s
        self._accepted_max_s = accepted_max_s
        self._is_stopping = is_stopping
        self._alert = alert
        self._map_lines = map_lines
        self._monotonic = monotonic

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Run rounds until told to stop; an unreachable ledger is waited for.

        Tells once how many orders were sent to another API, which it can't settle.

        Args:
            stop: set by whoever wants it to end; a running call finishes.
            interval_s: seconds between two rounds that found nothing to settle.

        """
        is_told = False
        while not stop.is_set():
            counts: Counts = Counter()
            try:
                if not is_told:
                    self._tell_of_other_apis()
                    is_told = True
                counts = self.run_once()
            except LedgerUnavailable as error:
                self._alert("ledger_unavailable", "", "", detail=str(error))
            if counts:
                telemetry.log("resolver_round", **dict(counts))
            # What was settled has made way for others: go on at once.
            if not any(counts[outcome.value] for outcome in _SETTLED):
                stop.wait(interval_s)

    def _tell_of_other_apis(self) -> None:
        if orders := self._ledger.count_of_other_apis():
            self._alert("orders_of_another_api", "", "", orders=orders)

    def run_once(self) -> Counts:
        """Bring on everything that is due, once.

        Returns how many orders ended in each outcome.

        Raises:
            LedgerUnavailable: what was begun is safe; run it again.

        """
        counts: Counts = Counter()
        is_over = threading.Event()
        lines = self._map_lines(
            lambda stored: self._bring_on_line(stored, is_over), self._due()
        )
        try:
            for each in lines:
                counts.update(each)
        finally:
            # What other threads have not begun yet is for the next round.
            is_over.set()
        counts.update(self._follow())
        return counts

    def drain(self, msisdn: str) -> int:
        """Run what is held of one subscriber, in order, as far as it goes.

        Returns how many orders were settled.

        Raises:
            LedgerUnavailable: what was begun is safe; run it again.

        """
        counts = self._drain(msisdn, threading.Event())
        return sum(counts[outcome.value] for outcome in _SETTLED)

    def _due(self, msisdn: str | None = None) -> list[Stored]:
        return self._ledger.due(
            given_up_s=self._given_up_s,
            again_s=self._again_s,
            is_parked_due=self._profile.kind is not Kind.NONE,
            limit=_BATCH,
            msisdn=msisdn,
        )

    def _bring_on_line(self, stored: Stored, is_over: threading.Event) -> Counts:
        """Go on with one order, and with what is held behind it."""
        counts: Counts = Counter()
        outcome = self._bring_on(stored, is_over)
        if outcome is not None:
            counts[outcome.value] += 1
        if outcome in _SETTLED:
            counts.update(self._drain(stored.msisdn, is_over))
        return counts

    def _drain(self, msisdn: str, is_over: threading.Event) -> Counts:
        """Each settled order makes the next one first in line.

        Crash here: what was claimed is in flight, and its lease runs out; the rest is
        held, and any resolver or pod goes on (tests/e2e/test_resolver.py).
        """
        counts: Counts = Counter()
        while True:
            held = [each for each in self._due(msisdn) if each.status is Status.HELD]
            outcome = self._bring_on(held[0], is_over) if held else None
            if outcome is None:
                return counts
            counts[outcome.value] += 1
            if outcome not in _SETTLED:
                return counts

    def _bring_on(self, stored: Stored, is_over: threading.Event) -> Outcome | None:
        """Go on with one order; what it raises puts aside that order alone.

        Returns None, and the round is over, while no call may be made.
        """
        if self._is_stopping() or is_over.is_set():
            return None
        with self._processing.breaker.permit(self._monotonic()) as permit:
            if not permit:
                is_over.set()
                return None
            try:
                return self._go_on(stored, permit)
            except LedgerUnavailable:
                raise
            # Whatever nobody foresaw: the next order must not pay for it.
            except Exception as error:  # noqa: BLE001
                self._put_aside(stored, error)
                return Outcome.UNFORESEEN

    def _put_aside(self, stored: Stored, error: Exception) -> None:
        """Leave an order for a later round, behind the others, and tell a person."""
        telemetry.error("unforeseen", error, key=stored.idempotency_key)
        self._alert("order_put_aside", stored.idempotency_key, type(error).__name__)
        self._ledger.looked(stored.idempotency_key)

    def _go_on(self, stored: Stored, permit: Permit) -> Outcome:
        """Go on with one order where the ledger says it stands."""
        order = self._restore(stored)
        is_found_by_age = stored.is_given_up and stored.status in _BROUGHT_BY_RECORDS
        if order is None or not is_found_by_age:
            # First, so that one that can't be brought on goes behind the others. What
            # the source has given up on is changed below, or must be found again at
            # once: a fresh look would say that its record still comes.
            self._ledger.looked(stored.idempotency_key)
        if order is None:
            return Outcome.UNFORESEEN
        receipt = self._processing.resume(order, permit)
        telemetry.log(
            "resolved",
            key=order.idempotency_key,
            attempt=receipt.attempt,
            outcome=receipt.outcome.value,
            reason=receipt.reason or None,
            reference=receipt.reference,
            subscriber=telemetry.mask(order.msisdn),
        )
        if receipt.outcome not in _SETTLED:
            self._leave(order)
        return receipt.outcome

    def _leave(self, order: TopUp) -> None:
        """Leave a row so that it is found again: no record will come for it."""
        entry, _ = self._ledger.look(order)
        if entry is not None and entry.status is Status.RELEASED:
            self._ledger.wait_again(entry)

    def _restore(self, stored: Stored) -> TopUp | None:
        try:
            return restore_topup(stored.payload, stored.position)
        except EventError:
            self._alert("payload_unreadable", stored.idempotency_key, "")
            return None

    def _follow(self) -> Counts:
        """Follow accepted recharges to their end, and watch for late reversals."""
        counts: Counts = Counter()
        for stored in self._ledger.accepted(
            again_s=self._again_s, watch_s=self._watch_s, limit=_BATCH
        ):
            if self._is_stopping() or self._is_pausing():
                break
            self._ledger.looked(stored.idempotency_key)
            if stored.status is Status.SUCCEEDED and not stored.payload:
                # Emptied by `topup purge` or `forget`: it is watched no more.
                continue
            order = self._restore(stored)
            if order is None:
                continue
            try:
                outcome = self._follow_one(order)
            except LedgerUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 # As in `_bring_on`.
                self._put_aside(stored, error)
                continue
            if outcome is not None:
                counts[outcome] += 1
        return counts

    def _is_pausing(self) -> bool:
        return self._processing.breaker.is_pausing(self._monotonic())

    def _follow_one(self, order: TopUp) -> str | None:
        """Ask what became of an accepted order; returns what it came to, if it did."""
        entry, _ = self._ledger.look(order)
        if entry is None:
            return None
        if reason := why_not_ours(entry, self._profile):
            # Its own API knows how it ended; this one can't be asked.
            if entry.status is Status.ACCEPTED:
                self._tell_once(entry, reason, reason)
            return None
        # Without a look-up nobody but a person can learn how it ended.
        found = LookUp(Finding.UNKNOWN)
        if self._profile.look_up is not None:
            found = self._api.look_up(entry.rendered_key)
            self._note(order, found)
        if entry.status is Status.SUCCEEDED:
            return self._watch(entry, found)
        if entry.status is Status.ACCEPTED:
            return self._end_accepted(entry, found)
        return None

    def _watch(self, entry: Entry, found: LookUp) -> str | None:
        """Record that a recharge which had succeeded was taken back."""
        if found.finding is not Finding.REVERSED:
            return None
        key = entry.idempotency_key
        self._ledger.record_reversal(key, entry.token or "", found.reference)
        self._alert("reversed", key, "")
        return "reversed"

    def _end_accepted(self, entry: Entry, found: LookUp) -> str | None:
        """Settle an accepted recharge by what was found, or say that it is open."""
        if found.finding is Finding.EXECUTED:
            answer = Answer(AnswerClass.DONE, reference=found.reference)
        elif found.finding in {Finding.FAILED, Finding.REVERSED}:
            is_settled = (entry.sent_age_s or 0.0) > self._profile.settle_s
            if not (entry.is_first_attempt or is_settled):
                # It may tell of an earlier attempt, and the last one can still land.
                return None
            reason = f"accepted_then_{found.finding.value}"
            answer = Answer(AnswerClass.NO, reason=reason)
            # The source was told 200: only a person can tell the subscriber.
            self._alert("rejected_after_accepted", entry.idempotency_key, reason)
        else:
            self._tell_of_open(entry, found.finding)
            return None
        if not self._ledger.end_doubt(entry, answer):
            return None
        return answer.classified.value

    def _note(self, order: TopUp, found: LookUp) -> None:
        """Tell the breaker whether the API could be asked."""
        now = self._monotonic()
        with self._processing.breaker.permit(now) as permit:
            if found.finding is Finding.UNKNOWN:
                permit.failed(order.msisdn, found.reason or "unknown", now, 0)
            elif found.finding in DEFINITE:
                permit.answered()

    def _tell_of_open(self, entry: Entry, finding: Finding) -> None:
        """Say whether an accepted recharge without an end needs a person."""
        age_s = entry.sent_age_s or 0.0
        if finding is Finding.SEVERAL:
            reason = "executed_several_times"
        elif finding is Finding.ABSENT and age_s > self._profile.settle_s:
            reason = "accepted_but_absent"
        elif age_s > self._accepted_max_s:
            reason = "accepted_overdue"
        else:
            return
        self._tell_once(entry, reason, finding.value)

    def _tell_once(self, entry: Entry, reason: str, detail: str) -> None:
        """Alert, and note in the row, why an accepted recharge needs a person."""
        is_told = entry.reason == reason or (entry.reason in _TOLD and reason in _TOLD)
        if not is_told and self._ledger.note(entry, reason):
            self._alert(reason, entry.idempotency_key, detail)


def make_resolver(
    settings: Settings, is_stopping: Callable[[], bool] = lambda: False
) -> Resolver:
    """Wire a resolver; nothing connects before the first round.

    Raises:
        SettingsError: a setting is wrong; names it.

    """
    profile = load_profile(settings)
    ledger = Ledger(make_engine(settings), profile, lease_s=settings.ledger_lease_s)
    api = RechargeApi(settings, profile, make_authenticator(settings))
    processing = Processing(
        ledger,
        api,
        profile,
        deadline_s=settings.recharge_api_deadline_s,
        lease_s=settings.ledger_lease_s,
        is_resolver=True,
        is_draining=is_stopping,
        alert=telemetry.alert,
    )
    return Resolver(
        ledger,
        processing,
        api,
        profile,
        given_up_s=settings.event_redelivery_max_s,
        again_s=settings.resolver_interval_s,
        watch_s=settings.recharge_api_reversal_watch_s,
        accepted_max_s=settings.recharge_api_accepted_max_s,
        is_stopping=is_stopping,
        map_lines=ThreadPoolExecutor(settings.server_threads, "line").map,
    )
