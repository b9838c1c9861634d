"""The use case: claim, recharge, settle; and what a delivery that comes again meets.

Owns the order of the steps and every decision about doubt; must never do I/O itself
or import a library: the ledger and the recharge API are handed in.

    claim   one statement, committed before the call
    call    once, under a hard deadline that is shorter than the claim's lease
    settle  one statement, committed before the 2xx

What becomes of an order whose answer was lost is in attempt_end.py; while most calls
fail, circuit_breaker.py lets none be made.

A process may die at every `# Crash here:`; the comment says what is on disk then.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Final, Protocol

from function.api_profile import (
    ANSWER_OF_ANOTHER_KEY,
    CONTRADICTS_ITSELF,
    ApiProfile,
    Kind,
)
from function.attempt_end import (
    DEFINITE,
    FINAL,
    NEEDS_PERSON,
    Attempt,
    Way,
    end_of_attempt,
    is_nothing_executed,
    way_out,
)
from function.circuit_breaker import CircuitBreaker, Permit
from function.errors import ClaimUncertain, LedgerUnavailable
from function.model import (
    Answer,
    AnswerClass,
    Claim,
    Entry,
    Finding,
    Line,
    LookUp,
    Outcome,
    Receipt,
    Refused,
    Status,
    TopUp,
)

#: How often a delivery that loses a race looks again before it is told to come back.
_ROUNDS_MAX: Final = 4
#: Answers kept in memory because the ledger could not be reached after the call.
_OWED_MAX: Final = 10_000
#: Longest reason of a row, in characters.
_REASON_MAX: Final = 64
#: Pause between two tries to settle, in seconds.
_SETTLE_PAUSE_S: Final = 0.2

_SETTLED: Final = {
    Status.SUCCEEDED: Outcome.SUCCEEDED,
    Status.ACCEPTED: Outcome.ACCEPTED,
    Status.REJECTED: Outcome.REJECTED,
    Status.ABANDONED: Outcome.ABANDONED,
}
_CIRCUIT_OPEN: Final = Answer(AnswerClass.RETRY, is_sent=False, reason="circuit_open")
_NOT_SENT: Final = Answer(AnswerClass.RETRY, is_sent=False, reason="claim_uncertain")


class LedgerPort(Protocol):
    """What processing needs of the ledger; `function.ledger.Ledger` promises it."""

    def claim(self, order: TopUp) -> Claim | None: ...
    def reclaim(self, entry: Entry) -> Claim | None: ...
    def look(self, order: TopUp) -> tuple[Entry | None, Line]: ...
    def settle(self, key: str, token: str, answer: Answer) -> bool: ...
    def give_back(
        self,
        key: str,
        token: str,
        answer: Answer,
        *,
        is_held: bool = False,
        wait_s: float = 0.0,
    ) -> bool: ...
    def doubt(
        self, key: str, token: str, answer: Answer, *, is_parked: bool
    ) -> bool: ...
    def expire(self, entry: Entry) -> bool: ...
    def end_doubt(self, entry: Entry, answer: Answer) -> bool: ...
    def park(self, entry: Entry, reason: str) -> bool: ...
    def note(self, entry: Entry, reason: str) -> bool: ...
    def keep_evidence(self, key: str, token: str, answer: Answer) -> bool: ...
    def hold(self, order: TopUp) -> bool: ...
    def put_off(self, order: TopUp) -> bool: ...
    def overtake(self, order: TopUp) -> list[str]: ...
    def end_place(self, order: TopUp) -> bool: ...
    def put_in_quarantine(self, refused: Refused) -> bool: ...
    def wait_again(self, entry: Entry) -> bool: ...


class RechargeApiPort(Protocol):
    """What processing needs of the recharge API."""

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer: ...
    def look_up(self, rendered_key: str) -> LookUp: ...


class Processing:
    """Turns a TopUp into exactly one effective recharge, or says what is known.

    Args:
        ledger: remembers.
        api: moves the credit.
        profile: what the API does about a repeated key.
        deadline_s: hard end of a call, in seconds from before its claim.
        lease_s: the claims' lease, in seconds; greater than `deadline_s`.
        is_resolver: this is the resolver: no record comes again for what it brings
            on, and it takes up what is parked.
        is_draining: true once no new call may begin.
        alert: told of what a person must look at: an action and the key.
        monotonic: the pod's clock, in seconds.
        sleep: waits between two tries to settle.

    """

    def __init__(
        self,
        ledger: LedgerPort,
        api: RechargeApiPort,
        profile: ApiProfile,
        *,
        deadline_s: float,
        lease_s: float,
        is_resolver: bool = False,
        is_draining: Callable[[], bool] = lambda: False,
        alert: Callable[..., None] = lambda *_, **_fields: None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ledger = ledger
        self._api = api
        self._profile = profile
        self._deadline_s = deadline_s
        self._lease_s = lease_s
        self._is_resolver = is_resolver
        self._is_draining = is_draining
        self._alert = alert
        self._monotonic = monotonic
        self._sleep = sleep
        self._owed = _Owed()
        #: Whether calls may be made now; the resolver asks it, too.
        self.breaker = CircuitBreaker(alert)
        self._is_refusal_told = False

    def process(self, order: TopUp) -> Receipt:
        """Bring one delivery of an order to an outcome.

        Raises:
            LedgerUnavailable: answer 503; the record comes again and meets whatever
                was committed.

        """
        with self.breaker.permit(self._monotonic()) as permit:
            return self._bring_on(order, permit)

    def resume(self, order: TopUp, permit: Permit) -> Receipt:
        """Bring on an order that is in the ledger; what the resolver does.

        Args:
            order: as it was recorded.
            permit: from `breaker`, taken before anything else.

        Raises:
            LedgerUnavailable: as `process`.

        """
        for _ in range(_ROUNDS_MAX):
            looked = self._monotonic()
            entry, line = self._ledger.look(order)
            if entry is None:
                continue
            receipt = self._resume(order, entry, line, looked, permit)
            if receipt is not None:
                return receipt
        return Receipt(Outcome.IN_FLIGHT, reason="contended")

    def _bring_on(self, order: TopUp, permit: Permit) -> Receipt:
        """Claim it and send it, or go on where the ledger says it stands."""
        for _ in range(_ROUNDS_MAX):
            if self._is_draining():
                return Receipt(Outcome.DRAINING)
            # Crash here: nothing happened; the redelivery begins anew
            # (tests/e2e/test_crash_points.py: request_read, claim_unsent).
            started = self._monotonic()
            claim = None
            if permit:
                claim = self._claim(
                    order.idempotency_key, lambda: self._ledger.claim(order)
                )
            if claim is not None:
                receipt = self._recharge(order, claim, started, permit)
                return receipt or self.resume(order, permit)
            entry, line = self._ledger.look(order)
            if entry is None:
                # Its own record may not come again, so it is recorded before it is
                # sent away.
                if not self._ledger.hold(order) and not permit:
                    self._ledger.put_off(order)
                continue
            if entry.fingerprint != order.fingerprint:
                return self._refuse_reused_key(order)
            receipt = self._resume(order, entry, line, started, permit)
            if receipt is not None:
                return receipt
        return Receipt(Outcome.IN_FLIGHT, reason="contended")

    def _resume(
        self, order: TopUp, entry: Entry, line: Line, looked: float, permit: Permit
    ) -> Receipt | None:
        """Go on where the ledger says this order stands; None means look again."""
        owed = self._owed.get(entry.token)
        if owed is not None and entry.token is not None:
            # This pod knows what the ledger could not be told; perhaps others have
            # ended the order since, and must hear that it was executed.
            claim = _claim_of(entry, entry.token)
            return self._finish(order, claim, owed, self._monotonic())
        settled = _SETTLED.get(entry.status)
        if settled is not None:
            return _repetition(settled, entry)
        if entry.status is Status.PARKED and not self._is_resolver:
            return _repetition(Outcome.PARKED, entry)
        if entry.status is Status.IN_FLIGHT:
            if not entry.is_lease_over:
                return Receipt(Outcome.IN_FLIGHT)
            self._ledger.expire(entry)
            return None
        return (
            self._wait(order, entry, line)
            if _must_wait(line)
            else (self._go_on(order, entry, looked, permit))
        )

    def _go_on(
        self, order: TopUp, entry: Entry, looked: float, permit: Permit
    ) -> Receipt | None:
        """It is first in its line, and nothing is paused."""
        if entry.status in {Status.IN_DOUBT, Status.PARKED}:
            return self._settle_doubt(order, entry, looked, permit)
        if entry.wait_s > 0:
            is_held = entry.status is Status.HELD
            outcome = Outcome.POSTPONED if is_held else Outcome.RELEASED
            return Receipt(outcome, reason="not_before")
        return self._send_again(order, entry, self._monotonic(), permit)

    def _wait(self, order: TopUp, entry: Entry, line: Line) -> Receipt | None:
        """Say why it can't run now; what the source has given up on is parked."""
        if line.is_paused:
            return Receipt(Outcome.PAUSED, reason=line.pause)
        if line.is_channel_paused:
            return self._keep(entry)
        if line.is_place_kept and self._ledger.end_place(order):
            # It stands in the line itself now, where its place was kept.
            return None
        if line.is_stuck:
            return Receipt(Outcome.HELD)
        overtaken = self._ledger.overtake(order)
        for key in overtaken:
            self._alert("earlier_overtaken", key, "source_gave_up")
        return None if overtaken else Receipt(Outcome.WAITING)

    def _keep(self, entry: Entry) -> Receipt | None:
        """Keep in the ledger what concerns one channel alone; the resolver goes on."""
        if entry.status is Status.IN_DOUBT:
            return self._park(entry, "channel_paused")
        if entry.status is Status.RELEASED and not self._ledger.wait_again(entry):
            return None
        return Receipt(Outcome.HELD, reason="channel_paused")

    def _send_again(
        self, order: TopUp, entry: Entry, started: float, permit: Permit
    ) -> Receipt | None:
        """Claim a known row anew and send; None means look again."""
        if self._is_draining():
            return Receipt(Outcome.DRAINING)
        if not permit:
            return Receipt(Outcome.CIRCUIT_OPEN)
        claim = self._claim(entry.idempotency_key, lambda: self._ledger.reclaim(entry))
        if claim is None:
            return None
        return self._recharge(order, claim, started, permit)

    def _claim(self, key: str, attempt: Callable[[], Claim | None]) -> Claim | None:
        """Claim, or disown what may have been claimed: never send without knowing."""
        try:
            return attempt()
        except ClaimUncertain as uncertain:
            self._owed.put(uncertain.token, _NOT_SENT)
            # What the resolver gives back must be found again in its next round.
            if self._ledger.give_back(
                key, uncertain.token, _NOT_SENT, is_held=self._is_resolver
            ):
                self._owed.drop(uncertain.token)
            raise

    def _recharge(
        self, order: TopUp, claim: Claim, started: float, permit: Permit
    ) -> Receipt | None:
        """Call the API under a claim, and write down how it ended; None: look again."""
        # Crash here: in flight, and its lease runs out; the redelivery treats it as
        # in doubt (test_crash_points: claim_committed, call_unsent).
        if not permit:
            # It opened while the claim was written.
            receipt = self._finish(order, claim, _CIRCUIT_OPEN, started + self._lease_s)
            is_released = receipt and receipt.outcome is Outcome.RELEASED
            return Receipt(Outcome.CIRCUIT_OPEN) if is_released else receipt
        answer = self._api.recharge(
            order, claim.rendered_key, started + self._deadline_s
        )
        # Crash here: as above, though the answer was here (answer_arrived).
        self._note(order, answer, permit)
        has_time = self._monotonic() - started < self._deadline_s / 2
        return self._finish(
            order,
            claim,
            answer,
            started + self._lease_s,
            may_find_out=has_time and bool(permit) and not self._is_draining(),
        )

    def _note(self, order: TopUp, answer: Answer, permit: Permit) -> None:
        """Tell the breaker, and a person when the API begins to refuse us."""
        if answer.classified in FINAL:
            self._is_refusal_told = False
            permit.answered()
            return
        reason = answer.reason or answer.classified.value
        if reason in {CONTRADICTS_ITSELF, ANSWER_OF_ANOTHER_KEY}:
            self._alert(reason, order.idempotency_key, "")
        permit.failed(order.msisdn, reason, self._monotonic(), answer.retry_after_s)
        if answer.classified is AnswerClass.OURS and not self._is_refusal_told:
            self._is_refusal_told = True
            self._alert("refused_us", order.idempotency_key, reason)

    def _finish(
        self,
        order: TopUp,
        claim: Claim,
        answer: Answer,
        give_up_at: float,
        *,
        may_find_out: bool = False,
    ) -> Receipt | None:
        """Write the answer; try again until the lease is over, then owe it."""
        self._owed.put(claim.token, answer)
        while True:
            try:
                receipt = self._write(order, claim, answer, may_find_out=may_find_out)
            except LedgerUnavailable:
                if self._monotonic() + _SETTLE_PAUSE_S >= give_up_at:
                    # The log is the second memory, should this process die, too.
                    self._alert(
                        "answer_owed",
                        order.idempotency_key,
                        answer.classified.value,
                        reference=answer.reference,
                    )
                    raise
                self._sleep(_SETTLE_PAUSE_S)
            except Exception as error:
                # Nobody foresaw this: the answer must not be lost with it.
                self._alert(
                    "answer_owed",
                    order.idempotency_key,
                    f"{answer.classified}:{answer.reference}:{type(error).__name__}",
                )
                raise
            else:
                self._owed.drop(claim.token)
                # Crash here: settled; the redelivery is a repetition
                # (settlement_committed).
                return receipt

    def _write(
        self, order: TopUp, claim: Claim, answer: Answer, *, may_find_out: bool
    ) -> Receipt | None:
        """One transition for one answer, by the token; fenced off, read again."""
        key, token = order.idempotency_key, claim.token
        end = end_of_attempt(
            answer,
            Attempt(
                self._profile.kind,
                is_resolver=self._is_resolver,
                is_doubted=claim.is_doubted,
                not_executed=claim.not_executed,
                may_find_out=may_find_out,
            ),
        )
        if answer.classified in FINAL:
            is_written = self._ledger.settle(key, token, answer)
        elif is_nothing_executed(answer):
            is_held = end.status is Status.HELD
            is_written = self._ledger.give_back(
                key, token, answer, is_held=is_held, wait_s=end.wait_s
            )
        else:
            is_parked = end.status is Status.PARKED
            is_written = self._ledger.doubt(key, token, answer, is_parked=is_parked)
        if not is_written:
            return self._fenced_off(order, claim, answer)
        if end.status is Status.IN_DOUBT:
            return None
        if end.needs_person:
            self._alert(Outcome.PARKED.value, key, answer.reason)
        reason = answer.reason if end.outcome is not Outcome.SUCCEEDED else ""
        return Receipt(end.outcome, answer.reference, reason, attempt=token)

    def _fenced_off(self, order: TopUp, claim: Claim, answer: Answer) -> Receipt:
        """Another took the claim over: keep the evidence, answer what the row says.

        Every success that a process received is in the row, in an attempt's row or in
        an alert, whoever has ended the order meanwhile.
        """
        key = order.idempotency_key
        entry, _ = self._ledger.look(order)
        if entry and _is_own_settlement(entry, claim, answer):
            outcome = _SETTLED[entry.status]
            return Receipt(outcome, entry.reference, entry.reason, attempt=claim.token)
        is_parked = entry and entry.status is Status.PARKED
        is_own = entry and entry.token == claim.token
        if is_parked and is_own and answer.classified not in FINAL:
            if self._profile.kind is Kind.NONE:
                # Our own, too: a person must still hear of it.
                self._alert(Outcome.PARKED.value, key, answer.reason)
            return Receipt(Outcome.PARKED, reason=answer.reason, attempt=claim.token)
        if self._ledger.keep_evidence(key, claim.token, answer):
            outcome = FINAL[answer.classified]
            return Receipt(outcome, answer.reference, attempt=claim.token)
        entry, _ = self._ledger.look(order)
        settled = _SETTLED.get(entry.status) if entry else None
        if entry is None or settled is None:
            return Receipt(Outcome.IN_FLIGHT, reason="fenced_off", attempt=claim.token)
        if _contradicts(entry, answer):
            self._alert("evidence_contradicts", key, answer.classified)
        return _repetition(settled, entry)

    def _settle_doubt(
        self, order: TopUp, entry: Entry, looked: float, permit: Permit
    ) -> Receipt | None:
        """Find out what became of the last attempt, as far as the API can tell.

        The function tries that once and parks what stays unknown; the resolver goes
        on. The deadline of what is sent within a window runs from before the row was
        read: a process that sleeps here finds its window over, and must not send.
        """
        way = way_out(entry, self._profile)
        if not isinstance(way, Way):
            return self._park(entry, way)
        if not permit:
            return self._park(entry, "circuit_open")
        if entry.doubts > 1 and not self._is_resolver:
            return self._park(entry, "unknown")
        if way is Way.REPEAT:
            return self._send_again(order, entry, looked, permit)
        return self._look_up(order, entry, permit)

    def _look_up(self, order: TopUp, entry: Entry, permit: Permit) -> Receipt | None:
        found = self._api.look_up(entry.rendered_key)
        if found.finding in DEFINITE:
            permit.answered()
        match found.finding:
            case Finding.EXECUTED:
                answer = Answer(AnswerClass.DONE, reference=found.reference)
                return self._end_doubt(entry, answer)
            case Finding.FAILED | Finding.REVERSED if not (
                entry.is_first_attempt or self._has_settled(entry)
            ):
                # It may tell of an earlier attempt, and the last one can still land.
                return self._park(entry, "not_settled_yet")
            case Finding.FAILED:
                answer = Answer(AnswerClass.NO, reason="looked_up_failed")
                return self._end_doubt(entry, answer)
            case Finding.REVERSED:
                # Executed once, and taken back: not for us to execute again.
                answer = Answer(
                    AnswerClass.NO, reference=found.reference, reason="reversed"
                )
                return self._end_doubt(entry, answer)
            case Finding.SEVERAL:
                reason = "executed_several_times"
                if entry.reason != reason:
                    self._alert(reason, entry.idempotency_key, "")
                return self._park(entry, reason)
            case Finding.ABSENT:
                return self._absent(order, entry, permit)
            case Finding.UNKNOWN:
                reason = found.reason or found.finding.value
                permit.failed(order.msisdn, reason, self._monotonic(), 0)
        return self._park(entry, found.reason or found.finding.value)

    def _absent(self, order: TopUp, entry: Entry, permit: Permit) -> Receipt | None:
        """Nothing found: proof only once the attempt can't land any more."""
        if not self._has_settled(entry):
            return self._park(entry, "not_settled_yet")
        if entry.last_class is AnswerClass.SAME_REFERENCE:
            # The API knows the reference and yet finds nothing: it contradicts itself.
            return self._park(entry, "used_but_absent")
        if self._profile.kind is Kind.REPLAY:
            return self._park(entry, "window_over")
        return self._send_again(order, entry, self._monotonic(), permit)

    def _has_settled(self, entry: Entry) -> bool:
        """Nothing of its last attempt can land any more."""
        return (entry.sent_age_s or 0.0) > self._profile.settle_s

    def _end_doubt(self, entry: Entry, answer: Answer) -> Receipt | None:
        if not self._ledger.end_doubt(entry, answer):
            return None
        reason = answer.reason
        return Receipt(FINAL[answer.classified], answer.reference, reason)

    def _park(self, entry: Entry, reason: str) -> Receipt | None:
        """Leave it to the resolver, or to a person, who is told once for each reason.

        What stands in a person's row stays there until another such reason.
        """
        is_parked = entry.status is Status.PARKED
        needs_person = reason in NEEDS_PERSON
        if is_parked and (entry.reason == reason or not needs_person):
            return Receipt(Outcome.PARKED, reason=entry.reason or reason)
        write = self._ledger.note if is_parked else self._ledger.park
        if not write(entry, reason[:_REASON_MAX]):
            return None
        if needs_person:
            self._alert(Outcome.PARKED.value, entry.idempotency_key, reason)
        return Receipt(Outcome.PARKED, reason=reason)

    def _refuse_reused_key(self, order: TopUp) -> Receipt:
        refused = Refused(
            Outcome.KEY_REUSED,
            "the idempotency key belongs to an order with other content",
            order.payload,
            len(order.payload),
            {"id": order.event_id, "source": order.event_source},
            order.position,
            order.idempotency_key,
        )
        self._ledger.put_in_quarantine(refused)
        self._alert(Outcome.KEY_REUSED.value, order.idempotency_key, "")
        return Receipt(Outcome.KEY_REUSED)


def _must_wait(line: Line) -> bool:
    return line.is_paused or line.is_channel_paused or line.blocker is not None


def _repetition(outcome: Outcome, entry: Entry) -> Receipt:
    return Receipt(outcome, entry.reference, entry.reason, is_repetition=True)


def _is_own_settlement(entry: Entry, claim: Claim, answer: Answer) -> bool:
    """Whether the row holds this very answer: only the word of it was lost (pure).

    The same token alone proves nothing: a person's decision and a look-up end an order
    without a new one. An accepted one may have come to its end since.
    """
    if entry.token != claim.token:
        return False
    is_accepted = answer.classified is AnswerClass.ACCEPTED
    if is_accepted and entry.last_class is AnswerClass.ACCEPTED:
        return entry.status in _SETTLED
    is_same = _SETTLED.get(entry.status) is FINAL.get(answer.classified, None)
    return entry.status in _SETTLED and is_same and entry.reference == answer.reference


def _contradicts(entry: Entry, answer: Answer) -> bool:
    """Whether an answer says otherwise than the settled row (pure)."""
    settled = _SETTLED[entry.status]
    is_other = None not in {answer.reference, entry.reference} and (
        answer.reference != entry.reference
    )
    outcome = FINAL.get(answer.classified, settled)
    is_taken = {outcome, settled} <= {Outcome.SUCCEEDED, Outcome.ACCEPTED}
    return is_other or not (outcome is settled or is_taken)


def _claim_of(entry: Entry, token: str) -> Claim:
    is_doubted = entry.doubts > 0
    return Claim(token, entry.rendered_key, is_doubted, entry.not_executed)


class _Owed:
    """Answers by token that the ledger has not been told yet; forgets the oldest."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._lock = Lock()

    def put(self, token: str, answer: Answer) -> None:
        with self._lock:
            self._answers[token] = answer
            if len(self._answers) > _OWED_MAX:
                self._answers.popitem(last=False)

    def get(self, token: str | None) -> Answer | None:
        with self._lock:
            return self._answers.get(token) if token else None

    def drop(self, token: str) -> None:
        with self._lock:
            self._answers.pop(token, None)
