"""A recharge API of any kind, whose book is the judge of every simulated run.

Owns what was executed and how the API answers; must never look at the ledger.

What it says passes the production profile's own rules, so their mistakes are seen, too.
A request may be refused, cut, answered in every way, or travel long after its caller
has gone: but never longer than the settling time allows, which is the assumption that
docs/GUARANTEES.md names.
"""

from dataclasses import dataclass, replace
from typing import Final

from function.api_profile import ApiProfile, Kind
from function.model import Answer, AnswerClass, Finding, LookUp, TopUp
from proof.chooser import Chooser, Point
from proof.scheduler import MICROS, Scheduler, Task, Violation

#: How long a request may travel, and how long its execution may be hidden from
#: look-ups; with the hard deadline they stay below the settling time.
TRAVEL_US: Final = 25 * MICROS
LAG_US: Final = 14 * MICROS
_FINAL_AFTER_US: Final = 5 * MICROS

#: What can become of a request, beside being executed and answered.
TROUBLES: Final = (
    "is refused a connection",
    "is cut before the API reads it",
    "travels on",
    "is answered 504 and travels on",
    "is executed slowly",
    "is rejected",
    "fails with 500",
    "is executed and answered 500",
    "is executed and the answer is lost",
    "is answered 429",
    "is answered 401",
    "is taken for a similar one",
    "is accepted",
)
_NOT_SENT: Final = Answer(AnswerClass.RETRY, is_sent=False, reason="connection_error")
_TOO_LATE: Final = Answer(AnswerClass.RETRY, is_sent=False, reason="deadline")
_CUT: Final = Answer(AnswerClass.UNKNOWN, reason="connection_error")
_TIMEOUT: Final = Answer(AnswerClass.UNKNOWN, reason="deadline")

#: Status and what the body says: `status` or `error.code`.
Said = tuple[int, str]
_SUCCEEDED: Final = (201, "succeeded")
_ACCEPTED: Final = (202, "accepted")
_REJECTED: Final = (422, "invalid_number")
_FAILED: Final = (500, "")
_IN_PROGRESS: Final = (409, "in_progress")
_USED: Final = (409, "reference_used")
_POISONED: Final[dict[str, Said]] = {
    "fails with 500": _FAILED,
    "is answered 429": (429, ""),
    "is taken for a similar one": (409, "similar_recently"),
}
#: What a poisoned subscriber's requests meet, each of them, for ever.
POISONS: Final = tuple(_POISONED)


@dataclass(slots=True)
class Execution:
    """One line of the book."""

    key: str
    reference: str
    at: int
    #: From when look-ups show it.
    visible_at: int
    #: `succeeded`, `pending`, `failed` (nothing was moved), `progress`.
    state: str
    #: A pending one ends then, as `ends_as`.
    final_at: int = 0
    ends_as: str = "succeeded"


@dataclass(slots=True)
class Request:
    """One that is still under way when its caller already waits, or has gone."""

    order: TopUp
    key: str
    #: It has arrived or is lost by then.
    lands_by: int
    caller: Task | None
    said: Said | None = None
    execution: Execution | None = None


class SimulatedApi:
    """What processing and the resolver are handed as the recharge API.

    Args:
        scheduler: its clock, and the pauses around each request.
        chooser: what becomes of requests.
        profile: kind, window, and what answers mean.
        troubles: the alternatives of a request, a part of TROUBLES.
        judge: told of each execution before anybody else.

    """

    def __init__(
        self,
        scheduler: Scheduler,
        chooser: Chooser,
        profile: ApiProfile,
        troubles: tuple[str, ...],
    ) -> None:
        self._scheduler = scheduler
        self.chooser = chooser
        self._profile = profile
        self._troubles = troubles
        self.book: dict[str, list[Execution]] = {}
        #: The order of the executions.
        self.executed: list[str] = []
        self.under_way: list[Request] = []
        #: Subscribers for whom everything fails, and how.
        self.poisoned: frozenset[str] = frozenset()
        self.poison = POISONS[0]
        #: Kind `replay`: when a key was first seen, and what it was told.
        self._told: dict[str, tuple[int, Said]] = {}
        self.calls: dict[str, int] = {}

    # -- What the function's client does -------------------------------------------

    def recharge(self, order: TopUp, rendered_key: str, deadline: float) -> Answer:
        """Send a request, as `RechargeApi.recharge` would see it end."""
        scheduler = self._scheduler
        scheduler.pause("sends the request")
        if scheduler.now / MICROS >= deadline:
            return _TOO_LATE
        trouble = self._trouble(order)
        if trouble == "is refused a connection":
            return _NOT_SENT
        if trouble == "is cut before the API reads it":
            return _CUT
        self.calls[rendered_key] = self.calls.get(rendered_key, 0) + 1
        ends_at = round(deadline * MICROS)
        if trouble == "is answered 504 and travels on":
            self._travel(order, rendered_key, None)
            return self._hear((504, ""), rendered_key, ends_at)
        if trouble == "travels on":
            request = self._travel(order, rendered_key, scheduler.running())
            return self._await(request, ends_at)
        if trouble == "is executed slowly":
            return self._start(order, rendered_key, ends_at)
        said = self._serve(order, rendered_key, trouble)
        if trouble == "is executed and the answer is lost":
            return _CUT
        return self._hear(said, rendered_key, ends_at)

    def look_up(self, rendered_key: str) -> LookUp:
        """Say what is visible under a key."""
        scheduler = self._scheduler
        scheduler.pause("looks it up")
        if self.chooser.deviates(Point.API) and self.chooser.pick(1) is not None:
            scheduler.say("    the look-up fails")
            return LookUp(Finding.UNKNOWN, reason="http_503")
        rows = [
            {
                "idempotencyKey": each.key,
                "reference": each.reference,
                "status": "pending" if each.state == "progress" else each.state,
            }
            for each in self._ended(rendered_key)
            if each.visible_at <= scheduler.now
        ]
        found = self._profile.read_look_up(200, {"recharges": rows}, rendered_key)
        scheduler.say(f"    finds it {found.finding}")
        return found

    # -- What the world does to it -------------------------------------------------

    def land(self, request: Request) -> None:
        """Let a request that was under way arrive, or be lost."""
        self.under_way.remove(request)
        key = request.key
        execution = request.execution
        if execution is not None:
            self._scheduler.say(f"    the slow {key} is done")
            self._execute(execution)
            said = self._tell(key, _SUCCEEDED)
        else:
            trouble = "is executed"
            if self.chooser.deviates(Point.API):
                fates = ("is lost", "is rejected", "fails with 500")
                number = self.chooser.pick(len(fates))
                trouble = trouble if number is None else fates[number]
            self._scheduler.say(f"    the late {key} arrives and {trouble}")
            if trouble == "is lost":
                return
            said = self._serve(request.order, key, trouble)
        if request.caller is not None:
            request.said = said
            request.caller.wakes_at = 0

    def executions(self, key: str) -> list[Execution]:
        """What the book says was executed under a key, pending ones included."""
        return [each for each in self._ended(key) if each.state != "failed"]

    def is_pending(self, key: str) -> bool:
        """Whether the API itself does not know yet how it ends."""
        return any(each.state in {"pending", "progress"} for each in self._ended(key))

    # -- Parts ---------------------------------------------------------------------

    def _trouble(self, order: TopUp) -> str:
        if order.msisdn in self.poisoned:
            trouble = self.poison
        elif self.chooser.deviates(Point.API):
            number = self.chooser.pick(len(self._troubles))
            trouble = "is executed" if number is None else self._troubles[number]
        else:
            trouble = "is executed"
        self._scheduler.say(f"    the request {trouble}")
        return trouble

    def _travel(self, order: TopUp, key: str, caller: Task | None) -> Request:
        lands_by = self._scheduler.now + TRAVEL_US
        request = Request(order, key, lands_by, caller)
        self.under_way.append(request)
        return request

    def _start(self, order: TopUp, key: str, ends_at: int) -> Answer:
        """Begin an execution that takes its time."""
        refusal = self._refusal(key)
        if refusal is not None:
            return self._hear(refusal, key, ends_at)
        request = self._travel(order, key, self._scheduler.running())
        request.execution = self._note(key, "progress")
        self._told.setdefault(key, (self._scheduler.now, _IN_PROGRESS))
        return self._await(request, ends_at)

    def _await(self, request: Request, ends_at: int) -> Answer:
        self._scheduler.pause("waits for the answer", ends_at)
        said, request.caller = request.said, None
        if said is None or self._scheduler.now >= ends_at:
            return _TIMEOUT
        return self._classify(said, request.key)

    def _hear(self, said: Said, key: str, ends_at: int) -> Answer:
        """The way back: the answer may come after the deadline, or to nobody."""
        self._scheduler.pause("hears the answer")
        if self._scheduler.now >= ends_at:
            return _TIMEOUT
        return self._classify(said, key)

    def _serve(self, order: TopUp, key: str, trouble: str) -> Said:
        """One request at the API itself."""
        if order.msisdn in self.poisoned:
            return _POISONED[self.poison]
        refusal = self._refusal(key)
        if refusal is not None:
            return refusal
        if trouble == "is rejected":
            self._note(key, "failed")
            return self._tell(key, _REJECTED)
        if trouble == "is answered 429":
            return (429, "")
        if trouble == "is answered 401":
            return (401, "")
        if trouble == "is taken for a similar one":
            return (409, "similar_recently")
        if trouble == "fails with 500":
            return _FAILED
        if trouble == "is accepted":
            execution = self._note(key, "pending")
            execution.final_at = self._scheduler.now + _FINAL_AFTER_US
            if self.chooser.deviates(Point.DETAIL) and self.chooser.pick(1) is not None:
                execution.ends_as = "failed"
            self._execute(execution)
            return self._tell(key, _ACCEPTED)
        self._execute(self._note(key, "succeeded"))
        said = self._tell(key, _SUCCEEDED)
        return _FAILED if trouble == "is executed and answered 500" else said

    def _refusal(self, key: str) -> Said | None:
        """What the API's kind does about a key that it has seen."""
        now = self._scheduler.now
        if self._profile.kind is Kind.REPLAY and key in self._told:
            first_at, said = self._told[key]
            if now - first_at <= self._profile.window_s * MICROS:
                return said
            # Forgotten, as documented: from now on it is a new one.
            del self._told[key]
        if self._profile.kind is Kind.REFUSE and self.executions(key):
            return _USED
        return None

    def _tell(self, key: str, said: Said) -> Said:
        """Answer, and keep the answer as a replaying API does."""
        first_at, _ = self._told.get(key, (self._scheduler.now, said))
        self._told[key] = (first_at, said)
        return said

    def _note(self, key: str, state: str) -> Execution:
        """Open a line of the book; look-ups may see it only later."""
        now = self._scheduler.now
        lag = 0
        if self.chooser.deviates(Point.DETAIL) and self.chooser.pick(1) is not None:
            lag = LAG_US
        known = self.book.setdefault(key, [])
        reference = f"R-{key}-{len(known) + 1}"
        execution = Execution(key, reference, now, now + lag, state)
        known.append(execution)
        return execution

    def _execute(self, execution: Execution) -> None:
        """The credit moves, now."""
        if execution.state == "progress":
            execution.state = "succeeded"
        self.executed.append(execution.key)
        self.on_execution(execution)
        if len(self.executions(execution.key)) > 1:
            raise Violation(f"double: {execution.key} was executed twice")

    def on_execution(self, execution: Execution) -> None:
        """Told of each execution; the world puts its judge here."""

    def _ended(self, key: str) -> list[Execution]:
        """The lines of a key, those whose time has come brought to their end."""
        known = self.book.get(key, [])
        for each in known:
            if each.state == "pending" and each.final_at <= self._scheduler.now:
                each.state = each.ends_as
        return known

    def _classify(self, said: Said, key: str) -> Answer:
        """What the production profile makes of it."""
        status, word = said
        answer = _understood(self._profile, status, word)
        if status not in {_SUCCEEDED[0], _ACCEPTED[0]}:
            return answer
        reference = next(
            (each.reference for each in self.executions(key)), answer.reference
        )
        return replace(answer, reference=reference)


#: Classification is pure, and slow beside a simulated call.
_UNDERSTOOD: Final[dict[tuple[int, str, str], Answer]] = {}


def _understood(profile: ApiProfile, status: int, word: str) -> Answer:
    known = _UNDERSTOOD.get((status, word, profile.name))
    if known is None:
        if status in {_SUCCEEDED[0], _ACCEPTED[0]}:
            document: object = {"status": word, "reference": "R", "idempotencyKey": "K"}
        else:
            document = {"error": {"code": word, "message": "no"}} if word else {}
        known = profile.classify(status, document, "K")
        _UNDERSTOOD[status, word, profile.name] = known
    return known
