"""What `topup doctor` says: one diagnosis a thing that was looked at.

Owns the severities and what they make of the exit status; must never look at anything
itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final


@unique
class Severity(StrEnum):
    """How bad it is, the worst first."""

    #: A guarantee does not hold.
    ERROR = "error"
    #: It should have been looked at and could not be: nothing is proven.
    UNKNOWN = "unknown"
    #: It holds, but something is not as the design wants it.
    WARNING = "warning"
    #: Not looked at, because this way of running can't.
    SKIPPED = "skipped"
    OK = "ok"


#: The rank of each severity, 0 the worst.
RANK: Final = {severity: rank for rank, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One line of the doctor's report."""

    severity: Severity
    #: What was looked at, such as `KafkaSource/topup-source`.
    subject: str
    message: str
    #: What to do; empty when nothing is.
    todo: str = ""


def ok(subject: str, message: str) -> Diagnosis:
    """All is as it must be."""
    return Diagnosis(Severity.OK, subject, message)


def skipped(subject: str, message: str, todo: str = "") -> Diagnosis:
    """Not looked at in this way of running."""
    return Diagnosis(Severity.SKIPPED, subject, message, todo)


def warning(subject: str, message: str, todo: str) -> Diagnosis:
    """Not as the design wants it."""
    return Diagnosis(Severity.WARNING, subject, message, todo)


def unknown(subject: str, message: str, todo: str) -> Diagnosis:
    """It could not be looked at."""
    return Diagnosis(Severity.UNKNOWN, subject, message, todo)


def error(subject: str, message: str, todo: str) -> Diagnosis:
    """A guarantee does not hold."""
    return Diagnosis(Severity.ERROR, subject, message, todo)


def exit_status(diagnoses: Iterable[Diagnosis], *, is_strict: bool = False) -> int:
    """0 nothing is wrong, 1 an error, 3 no error, but something is not known.

    A warning is an error when `is_strict`. 2 is click's own, for wrong use.
    """
    found = {diagnosis.severity for diagnosis in diagnoses}
    if Severity.ERROR in found or (is_strict and Severity.WARNING in found):
        return 1
    return 3 if Severity.UNKNOWN in found else 0
