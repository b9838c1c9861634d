"""The book of the sandbox recharge API: what it was asked, and what it did.

Owns the entries, their writing and their reading: a line is appended whole, and none is
ever changed. It must never import `function`, or know why an entry is written: it is
what the ledger is judged by.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

Entry = Literal["called", "accepted", "executed", "rejected", "looked_up", "reversed"]


@dataclass(frozen=True, slots=True)
class BookEntry:
    """One line of the book; what doesn't apply is empty and not written."""

    #: When, UTC.
    at: datetime
    #: `called`: a POST was read. `accepted`: taken over, ends at `due_at`.
    #: `executed`: credit moved. `rejected`: it never will. `looked_up`: a look-up was
    #: read. `reversed`: credit was taken back.
    entry: Entry
    #: Joins what one POST caused; numbers go up in the order of the book.
    call: int = 0
    key: str = ""
    msisdn: str = ""
    amount_minor: int = 0
    currency: str = ""
    reference: str = ""
    fault: str = ""
    #: Hash of the request's body: tells a repetition from a reused key.
    content: str = ""
    #: Of a rejection.
    status: int = 0
    code: str = ""
    #: When an accepted recharge ends, or an executed one is taken back.
    due_at: datetime | None = None

    def to_json(self) -> dict[str, str | int]:
        """Its JSON document, as in the file."""
        document = {_JSON_NAMES.get(k, k): v for k, v in asdict(self).items() if v}
        return {
            k: v.isoformat(timespec="microseconds") if isinstance(v, datetime) else v
            for k, v in document.items()
        }

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """Read one line of the file.

        Raises:
            ValueError: it isn't one of ours.

        """
        document = json.loads(line)
        if not isinstance(document, dict):
            raise ValueError("an entry is an object")  # noqa: TRY004
        given = {f.name: document.get(_JSON_NAMES.get(f.name, f.name)) for f in _FIELDS}
        for name in ("at", "due_at"):
            if (text := given[name]) is not None:
                given[name] = datetime.fromisoformat(text)
        try:
            return cls(**{k: v for k, v in given.items() if v is not None})
        except TypeError as error:
            raise ValueError(str(error)) from None


_FIELDS = fields(BookEntry)
_JSON_NAMES = {"amount_minor": "amountMinor", "due_at": "dueAt"}


class Book:
    """Reads what the sandbox wrote down: the judge of the whole project.

    May be read at any time, by any process, also while the sandbox writes or after it
    was killed: a line without its end is not there yet. A book that doesn't exist yet
    is empty.

    Args:
        path: the JSONL file.

    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def entries(self) -> list[BookEntry]:
        """All entries, in the order of their effect.

        Raises:
            ValueError: a whole line is unreadable; then nothing can be judged.

        """
        return list(self.stream())

    def stream(self) -> Iterator[BookEntry]:
        """All entries, one at a time: a book may be larger than memory should be.

        Raises:
            ValueError: as `entries`.

        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                if line.endswith(b"\n"):
                    yield BookEntry.from_json(line)

    def calls(self) -> list[BookEntry]:
        """Every POST that was read, whatever came of it."""
        return self._all("called")

    def executions(self) -> list[BookEntry]:
        """Every movement of credit, in the order of execution."""
        return self._all("executed")

    def executions_by_key(self) -> dict[str, list[BookEntry]]:
        """The executions of each key; more than one is a double."""
        by_key: dict[str, list[BookEntry]] = {}
        for execution in self.executions():
            by_key.setdefault(execution.key, []).append(execution)
        return by_key

    def _all(self, entry: Entry) -> list[BookEntry]:
        return [e for e in self.entries() if e.entry == entry]


class BookWriter:
    """Appends to the book, each entry in one write: it is there whole or not at all.

    Args:
        path: the JSONL file; made if it isn't there.

    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(path, flags, 0o644)
        # A line cut by a full disk never took effect; the next must not grow onto it.
        content = path.read_bytes()
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    def append(self, entry: BookEntry) -> None:
        """Write one entry.

        Raises:
            OSError: it isn't there, or not whole.

        """
        line = json.dumps(entry.to_json(), separators=(",", ":")).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError("the book's disk is full")

    def close(self) -> None:
        """Write nothing more."""
        # A straggler must not write into a file that gets the same number.
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
