"""What becomes of an order when a call has ended: pure, and the whole truth table.

Owns the bound of every reason for which a record may stand at the head of its partition
(docs/GUARANTEES.md); must never do I/O.

    the call ended with …      before, it was    who   then
    -------------------------  ----------------  ----  ------------------------------
    done, accepted, a no       anything          both  settled
    nothing sent               never in doubt    f     released: it waits at its place
                                                 r     held, the next round tries it
    "not executed", so far     never in doubt    f     released, not before the API's
    fewer than three of them                           own wait, if that is no longer
                                                       than the longest pause
    "not executed" otherwise   never in doubt    both  postponed
    nothing executed           in doubt before   both  parked: doubt stays
    unknown, and the API can   never in doubt    f     found out at once: one look-up,
    be asked or repeats, time                          or one repetition of the key
    is left, breaker closed
    unknown otherwise          anything          both  parked

f is the function, r the resolver. An outage is no other case: it opens the circuit
breaker, and then nothing is called (circuit_breaker.py). What is parked the resolver
settles, as far as the API lets it; `way_out` says how, and who needs a person.
"""

from enum import Enum
from typing import Final, NamedTuple

from function.api_profile import ROWS_OF_OTHER_KEYS, ApiProfile, Kind
from function.circuit_breaker import PAUSE_S_MAX
from function.model import (
    NOTHING_EXECUTED,
    Answer,
    AnswerClass,
    Entry,
    Finding,
    Outcome,
    Status,
)

#: Answers "not executed" to one order, after which it is postponed.
NOT_EXECUTED_MAX: Final = 3
#: How long it is postponed at first, in seconds; doubled, up to the longest pause.
POSTPONED_S_MIN: Final = 10.0

#: What an answer that ends an order makes of it.
FINAL: Final = {
    AnswerClass.DONE: Outcome.SUCCEEDED,
    AnswerClass.ACCEPTED: Outcome.ACCEPTED,
    AnswerClass.NO: Outcome.REJECTED,
}
#: What a look-up finds where the API knows how an order ended.
DEFINITE: Final = frozenset(
    {Finding.EXECUTED, Finding.FAILED, Finding.REVERSED, Finding.SEVERAL}
)

#: Why this API can't say what became of an order: it was sent to another one, or
#: nobody knows to which.
API_OF_ANOTHER_IDENTITY: Final = "api_of_another_identity"
API_IDENTITY_UNKNOWN: Final = "api_identity_unknown"

#: Why a parked order is a person's case: nothing automatic settles it, or the profile
#: does not fit the API.
NEEDS_PERSON: Final = frozenset(
    {
        API_IDENTITY_UNKNOWN,
        API_OF_ANOTHER_IDENTITY,
        ROWS_OF_OTHER_KEYS,
        "api_kind_changed",
        "api_kind_unknown",
        "cannot_be_found_out",
        "executed_several_times",
        "used_but_absent",
        "window_over",
    }
)


class Attempt(NamedTuple):
    """What is known of the order whose call has ended."""

    kind: Kind
    is_resolver: bool
    #: An earlier attempt of it ended unknown.
    is_doubted: bool
    #: Answers "not executed" to it before this one.
    not_executed: int
    #: There is time to find out at once, and the breaker lets it.
    may_find_out: bool


class End(NamedTuple):
    """What to write, and what to tell the source."""

    outcome: Outcome
    #: IN_DOUBT: find out now.
    status: Status
    #: Not to be tried before so many seconds have passed.
    wait_s: float = 0.0
    #: Nothing automatic settles it.
    needs_person: bool = False


def end_of_attempt(answer: Answer, attempt: Attempt) -> End:
    """Decide what becomes of an order, by the module's table (pure)."""
    final = FINAL.get(answer.classified)
    if final is not None:
        # A no to a second send is final, too: it is sent again only within a replay
        # window, when the first was looked up and absent, or when a person decided.
        return End(final, Status(final.value))
    needs_person = attempt.kind is Kind.NONE
    is_nothing = is_nothing_executed(answer)
    if is_nothing and not attempt.is_doubted:
        return _given_back(answer, attempt)
    can_find_out = not (needs_person or attempt.is_resolver or attempt.is_doubted)
    if not is_nothing and can_find_out and attempt.may_find_out:
        return End(Outcome.PARKED, Status.IN_DOUBT)
    return End(Outcome.PARKED, Status.PARKED, needs_person=needs_person)


def is_nothing_executed(answer: Answer) -> bool:
    """Whether this attempt provably executed nothing; earlier ones may have."""
    return answer.classified in NOTHING_EXECUTED or not answer.is_sent


def _given_back(answer: Answer, attempt: Attempt) -> End:
    if not answer.is_sent:
        status = Status.HELD if attempt.is_resolver else Status.RELEASED
        return End(Outcome.RELEASED, status)
    times = attempt.not_executed + 1
    is_early = times < NOT_EXECUTED_MAX and answer.retry_after_s <= PAUSE_S_MAX
    if is_early and not attempt.is_resolver:
        is_ours = answer.classified is AnswerClass.OURS
        outcome = Outcome.REFUSED_US if is_ours else Outcome.RELEASED
        return End(outcome, Status.RELEASED, answer.retry_after_s)
    doublings = max(0, min(times - NOT_EXECUTED_MAX, 8))
    own_s = min(POSTPONED_S_MIN * 2**doublings, PAUSE_S_MAX)
    return End(Outcome.POSTPONED, Status.HELD, max(own_s, answer.retry_after_s))


class Way(Enum):
    """How a doubt can be ended without a person."""

    REPEAT = "repeat"
    LOOK_UP = "look_up"


def why_not_ours(entry: Entry, profile: ApiProfile) -> str:
    """Why this API can't say what became of an order; empty if it can (pure).

    Args:
        entry: the order as it was read, sent at least once.
        profile: of the API that is called now.

    """
    if entry.api_identity == profile.identity:
        return ""
    is_unknown = entry.api_identity is None
    return API_IDENTITY_UNKNOWN if is_unknown else API_OF_ANOTHER_IDENTITY


def way_out(entry: Entry, profile: ApiProfile) -> Way | str:
    """How the API lets a doubt be ended, or why only a person can end it (pure).

    Args:
        entry: the order as it was read; its ages are of that moment.
        profile: of the API that is called now.

    """
    kind = profile.kind
    if entry.api_kind != kind:
        # What was sent to one kind of API is not repeated to another; nor is what an
        # early revision sent, of which nobody knows to which.
        return "api_kind_unknown" if entry.api_kind is None else "api_kind_changed"
    if reason := why_not_ours(entry, profile):
        return reason
    if kind is Kind.REPLAY:
        is_used = entry.last_class is AnswerClass.SAME_REFERENCE
        if is_used and profile.look_up is not None:
            # The first one got there: asking ends it, and repeating does not.
            return Way.LOOK_UP
        # What is sent now may land as late as the settling time says.
        age_s = (entry.first_sent_age_s or 0.0) + profile.settle_s
        if age_s < profile.window_s:
            return Way.REPEAT
        # A repeated key protects no more, so it is never sent again.
        kind = profile.kind_after_window
    if kind in {Kind.REFUSE, Kind.LOOKUP}:
        return Way.LOOK_UP
    return "cannot_be_found_out"
