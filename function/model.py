"""What a top-up is, which statuses it can have, and every way an event can end.

Owns the words of the project as frozen types and the legal transitions as data;
must never do I/O or import anything but the standard library.

        claim            ┌────────────── in_flight ──────────────┐
    (new) ──────────────►│ done │ accepted │ no │ nothing sent │ unknown
      │                  ▼      ▼          ▼    ▼              ▼
      │            succeeded accepted  rejected released    in_doubt ──► parked
      │                           │                │           │            │
      └──► held ◄─────────────────┼── overtaken ───┘           └─ looked up: settled,
           (behind an earlier     └─► succeeded | rejected        or in_flight again;
            one of its subscriber)                                or a person decides
"""

from dataclasses import dataclass
from enum import Enum, StrEnum, unique
from typing import Final, NamedTuple


@unique
class Status(StrEnum):
    """Where a top-up stands in the ledger."""

    #: Claimed by an attempt that may be calling the recharge API right now.
    IN_FLIGHT = "in_flight"
    #: Sent, or perhaps sent, with no answer; it is being found out, or parked.
    IN_DOUBT = "in_doubt"
    #: In doubt for longer: the resolver settles it, or a person where it can't.
    PARKED = "parked"
    #: Waiting behind an unsettled earlier top-up of the same subscriber, or for a time.
    HELD = "held"
    #: Given back: provably nothing was executed; the next delivery claims it.
    RELEASED = "released"
    #: Taken over by the recharge API, which finishes it later.
    ACCEPTED = "accepted"
    #: Executed, with the API's reference.
    SUCCEEDED = "succeeded"
    #: Refused by the API's definite no.
    REJECTED = "rejected"
    #: Given up by a person's decision.
    ABANDONED = "abandoned"


#: A later top-up of the same subscriber waits while an earlier one is in these.
UNSETTLED: Final = frozenset(
    {
        Status.IN_FLIGHT,
        Status.IN_DOUBT,
        Status.PARKED,
        Status.HELD,
        Status.RELEASED,
    }
)

#: Only the API that an order was sent to can say how these end.
ENDED_BY_THE_API: Final = frozenset(
    {Status.IN_FLIGHT, Status.IN_DOUBT, Status.PARKED, Status.ACCEPTED}
)

#: Never left again.
TERMINAL: Final = frozenset({Status.SUCCEEDED, Status.REJECTED, Status.ABANDONED})

#: The answers that can end a claim or a doubt, by whatever evidence.
_TAKEN: Final = frozenset({Status.SUCCEEDED, Status.ACCEPTED})
_ANSWERED: Final = _TAKEN | {Status.REJECTED}

#: The legal transitions: from -> to. The ledger refuses every other.
TRANSITIONS: Final[dict[Status, frozenset[Status]]] = {
    # Held again by the resolver: no record will come for what it releases.
    Status.IN_FLIGHT: _ANSWERED
    | {Status.RELEASED, Status.IN_DOUBT, Status.PARKED, Status.HELD},
    Status.IN_DOUBT: _ANSWERED | {Status.IN_FLIGHT, Status.PARKED, Status.ABANDONED},
    # By the resolver; held again by a person's "not executed, call again".
    Status.PARKED: _ANSWERED | {Status.IN_FLIGHT, Status.HELD, Status.ABANDONED},
    # A fenced attempt's success is evidence that settles a row nobody holds.
    Status.HELD: _TAKEN | {Status.IN_FLIGHT, Status.ABANDONED},
    Status.RELEASED: _TAKEN | {Status.IN_FLIGHT, Status.HELD, Status.ABANDONED},
    # By the resolver; abandoned by a person where the API never says how it ended.
    Status.ACCEPTED: TERMINAL,
    Status.SUCCEEDED: frozenset(),
    Status.REJECTED: frozenset(),
    Status.ABANDONED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Position:
    """Where in Kafka the record stands; evidence and order, never identity."""

    #: Kafka topic.
    topic: str
    #: Partition number, from 0.
    partition: int
    #: Offset in the partition, from 0.
    offset: int


@dataclass(frozen=True, slots=True)
class TopUp:
    """A subscriber's order as it arrived, checked."""

    #: `channel:rechargeId`, each percent-encoded; ASCII, at most 200 characters.
    idempotency_key: str
    #: SHA-256 in hex of what the order does and to whom.
    fingerprint: str
    #: The app, shop or server that took the order.
    channel: str
    #: The order's name, unique within its channel.
    recharge_id: str
    #: The subscriber in E.164 with `+`; order and exclusion are promised for it.
    msisdn: str
    #: Integer amount in minor units of `currency`, at least 1.
    amount_minor: int
    #: ISO 4217 alphabetic code.
    currency: str
    #: When the subscriber asked, as the producer wrote it (RFC 3339).
    requested_at: str
    #: Whose remaining credit moves, or None; part of the fingerprint and the call.
    donor_msisdn: str | None
    #: The event's data as it came, kept so that a held top-up can be run later.
    payload: bytes
    #: Where in Kafka it stands, or None when it was posted directly.
    position: Position | None
    #: The CloudEvent's id and source, for the logs only.
    event_id: str
    event_source: str
    #: The Kafka record's key, where the delivery tells it: evidence, never identity.
    record_key: str | None = None


@unique
class AnswerClass(StrEnum):
    """What an answer of the recharge API means (docs/ARCHITECTURE.md)."""

    DONE = "done"
    ACCEPTED = "accepted"
    NO = "no"
    SAME_REFERENCE = "same_reference"
    SAME_CONTENT = "same_content"
    RETRY = "retry"
    OURS = "ours"
    UNKNOWN = "unknown"
    #: Not an answer, but an event of its own: an executed recharge was taken back.
    REVERSED = "reversed"


#: Classes that prove that this attempt executed nothing.
NOTHING_EXECUTED: Final = frozenset(
    {AnswerClass.RETRY, AnswerClass.SAME_CONTENT, AnswerClass.OURS}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one call to the recharge API ended."""

    classified: AnswerClass
    #: False only if it is proven that no byte of the request left us.
    is_sent: bool = True
    #: HTTP status, or None when there was no answer.
    http_status: int | None = None
    #: The API's own reference, if it gave one.
    reference: str | None = None
    #: A short constant that says why, from the API's code or from our own table;
    #: never foreign text.
    reason: str = ""
    #: The API's own words, bounded; kept in the ledger, never logged or answered.
    words: str = ""
    #: The wait that the API names (`Retry-After`), in seconds; 0 if it names none.
    retry_after_s: float = 0.0


@unique
class Finding(StrEnum):
    """What a look-up at the recharge API found."""

    EXECUTED = "executed"
    FAILED = "failed"
    PENDING = "pending"
    SEVERAL = "several"
    #: Executed, and taken back later.
    REVERSED = "reversed"
    ABSENT = "absent"
    #: The look-up itself failed, so nothing was learnt.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class LookUp:
    """A finding with the API's reference, if there is one."""

    finding: Finding
    reference: str | None = None
    reason: str = ""


class Claim(NamedTuple):
    """The right to send once, for as long as the lease lasts."""

    #: Random; fences this attempt against every other. Never used twice.
    token: str
    #: What the API is given as the key; stored before the first send.
    rendered_key: str
    #: Whether an earlier attempt of this order had an unknown outcome.
    is_doubted: bool
    #: How often the API has answered that it did not execute this order.
    not_executed: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the ledger as it was read; ages are by the database's clock."""

    idempotency_key: str
    fingerprint: str
    status: Status
    #: The last attempt's token; None before the first attempt.
    token: str | None
    #: The lease of an in-flight row has run out.
    is_lease_over: bool
    #: What the API was given as the key.
    rendered_key: str
    #: Seconds since the last attempt's claim; None before the first attempt.
    sent_age_s: float | None
    #: Seconds since the first attempt's claim; None before the first attempt.
    first_sent_age_s: float | None
    #: Attempts of unknown outcome so far; doubt is sticky.
    doubts: int
    #: How often the API has answered that it did not execute this order.
    not_executed: int
    #: Seconds for which it must not be tried yet; 0 or less: it may be.
    wait_s: float
    #: The API's kind when this was last sent; None if it never was, or nobody knows.
    api_kind: str | None
    #: Which API this was last sent to; None if to none, or nobody knows.
    api_identity: str | None
    #: Class of the last answer that was not a plain success, if any.
    last_class: AnswerClass | None
    #: The API's reference, once known.
    reference: str | None
    #: Why it was refused, parked or needs a person: a short constant, or empty.
    reason: str

    @property
    def is_first_attempt(self) -> bool:
        """What a look-up finds is about the last attempt: there was no other."""
        return self.sent_age_s == self.first_sent_age_s


@dataclass(frozen=True, slots=True)
class Line:
    """What stands before a top-up: the first unsettled one of its subscriber."""

    #: An operator has paused everything: partitions wait.
    is_paused: bool
    #: An operator has paused this channel alone: its orders are kept in the ledger.
    is_channel_paused: bool
    #: Status of the blocker, or None when this top-up is first in line.
    blocker: Status | None
    #: A parked or held one stands before it: its own record need not come again.
    is_stuck: bool
    #: Its own place is kept by a row that stands for its record: see `kept_place`.
    is_place_kept: bool = False
    #: Who has paused it, and why, in their own words.
    pause: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """An open or accepted order as the resolver finds it in the ledger."""

    idempotency_key: str
    msisdn: str
    payload: bytes
    position: Position | None
    status: Status
    #: Nothing happened to it for so long that the source must have given up.
    is_given_up: bool


class Outcome(Enum):
    """Every way an event can end: a row of the README's table each.

    main.py gives each its HTTP status.
    """

    SUCCEEDED = "succeeded"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    ABANDONED = "abandoned"
    MALFORMED = "malformed"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    KEY_REUSED = "key_reused"
    #: Of a type that this version does not know; a roll-out may be under way.
    UNKNOWN_TYPE = "unknown_type"
    #: Recorded with its bytes after waiting in vain: a replay brings it again.
    QUARANTINED = "quarantined"
    #: No token or a bad one, where tokens are demanded: nothing was even read.
    NOT_ADMITTED = "not_admitted"
    #: Another attempt holds a live claim of this key.
    IN_FLIGHT = "in_flight"
    #: Recorded behind another one of its subscriber whose own record comes again.
    WAITING = "waiting"
    RELEASED = "released"
    PARKED = "parked"
    #: The API answered too often that it did not execute it: the resolver tries later.
    POSTPONED = "postponed"
    #: Recorded behind one that nothing automatic will settle soon.
    HELD = "held"
    REFUSED_US = "refused_us"
    PAUSED = "paused"
    #: The API looks down: recorded, and not called.
    CIRCUIT_OPEN = "circuit_open"
    DRAINING = "draining"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    UNFORESEEN = "unforeseen"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a top-up, and what to tell the source."""

    outcome: Outcome
    #: The API's reference, once known.
    reference: str | None = None
    #: Why, as a short constant.
    reason: str = ""
    #: Settled before this delivery.
    is_repetition: bool = False
    #: This attempt's token, for the logs.
    attempt: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """An event that was recorded and can never be executed as it is."""

    #: `malformed`, `invalid`, `too_large`, `key_reused`, `unknown_type`, `unforeseen`.
    outcome: Outcome
    #: The rule that was broken and where; safe to log.
    detail: str
    #: The bytes as they came; cut to 16 KiB when too large.
    raw: bytes
    #: Content-Length as announced, or what was read.
    announced_bytes: int
    #: The request's CloudEvent attributes and content type.
    attributes: dict[str, str]
    position: Position | None
    #: Known only for a reused key, and for one whose place in a line is kept.
    idempotency_key: str | None = None


class Sighting(NamedTuple):
    """What the ledger knows of something that came and could not be recorded yet."""

    #: How often it was seen, this time included.
    times: int
    #: Seconds since it was seen first; 0 the first time.
    age_s: float


#: How the key of a row begins that keeps a record's place: no channel does,
#: percent-encoded as they are.
PLACE: Final = "!"


def kept_place(refused: Refused, subscriber: str) -> TopUp:
    """A row that keeps the place of a record that nobody could read an order from.

    It is parked and was never sent: the subscriber's later orders are held behind it
    until the record itself is replayed, or a person abandons it.

    Args:
        refused: with its position and the key of the row.
        subscriber: as the record's key names it.

    """
    return TopUp(
        idempotency_key=refused.idempotency_key or "",
        fingerprint="",
        channel=PLACE,
        recharge_id="",
        msisdn=subscriber,
        amount_minor=0,
        currency="XXX",
        requested_at="",
        donor_msisdn=None,
        payload=b"",
        position=refused.position,
        event_id="",
        event_source="",
    )


def key_of_place(position: Position) -> str:
    """The key of the row that keeps a record's place: its position, in ASCII."""
    where = f"{position.topic}:{position.partition}:{position.offset}"
    # A topic may have 249 characters, and a key 200.
    return f"{PLACE}{where[-199:]}"


def is_kept_place(idempotency_key: str) -> bool:
    """Whether this row is no order, but keeps the place of a record."""
    return idempotency_key.startswith(PLACE)
