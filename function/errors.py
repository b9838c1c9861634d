"""The errors of the function: one tree, and what each means to the caller.

Owns the error classes; imports nothing.

    TopupError
    ├── SettingsError          a setting is missing or wrong: refuse to start
    ├── EventError             this delivery can't become a TopUp
    │   ├── MalformedEvent     not a readable CloudEvent with JSON data: quarantine, 400
    │   ├── InvalidEvent       readable, but breaks a rule: quarantine, 400
    │   └── UnknownEventType   not ours, or newer than this software: 503, later
    │                          quarantine, 422
    ├── LedgerError
    │   ├── LedgerUnavailable  nothing is known to be half-done: 503, deliver again
    │   ├── ClaimUncertain     perhaps committed: never send, disown the token, 503
    │   └── IllegalTransition  a bug: the ledger refuses a move that model forbids
    ├── MigrationError         the schema can't be brought up to date
    ├── DocumentsUnreadable    `topup doctor` has nothing to look at
    └── OperationRefused       what a person or a job asked is wrong now

A recharge that fails is no exception: it is an `Answer` with a class.
"""


class TopupError(Exception):
    """Base of everything that this project raises on purpose."""


class SettingsError(TopupError):
    """A setting is missing or wrong; the message names each and says what to do."""


class EventError(TopupError):
    """A delivery can't become a TopUp; `str(error)` is safe to answer and to log.

    The message names the place and the rule that was broken, never a value of
    the payload.
    """


class MalformedEvent(EventError):
    """Not a readable CloudEvent with JSON data: record it in quarantine."""


class InvalidEvent(EventError):
    """Readable, but breaks a rule of the payload: record it in quarantine."""


class UnknownEventType(EventError):
    """Not our event type, or a newer major version: our software is old."""

    def __init__(self, reason: str, event_type: str) -> None:
        super().__init__(reason)
        #: Foreign text: the type as the event has it.
        self.event_type = event_type


class LedgerError(TopupError):
    """Base of the ledger's errors; messages never quote a statement or a value."""


class LedgerUnavailable(LedgerError):
    """The ledger can't be used now: answer 503, so that the record comes again.

    What was under way was not done, or can be repeated.
    """


class ClaimUncertain(LedgerUnavailable):
    """The connection broke while a claim was under way: it may be committed.

    The caller must not send; it gives the claim back by its token.
    """

    def __init__(self, token: str, reason: str) -> None:
        super().__init__(reason)
        #: The fence of the attempt that may hold the claim.
        self.token = token


class IllegalTransition(LedgerError):
    """A bug: the model forbids this change of status."""


class MigrationError(TopupError):
    """The ledger's schema can't be brought up to date; the message says why."""


class OperationRefused(TopupError):
    """The ledger is as it was: what was asked is wrong now; the message says why."""


class DocumentsUnreadable(TopupError):
    """The manifests, or the package that reads a cluster, are not there; says which."""
