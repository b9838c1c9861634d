"""One table of a TOML file, of which every name must be known.

Owns the words for what is wrong with it; must never read a file. A name that is written
wrongly would else be left out in silence, and the rest mean something else.
"""

import difflib
import math
from collections.abc import Iterator
from typing import Any, Final

_ANY: Final = object()


class ClosedTable:
    """Hands out values by name and type; `close` refuses what nobody asked for.

    Args:
        name: the table's name, as in `[request.headers]`; empty for the whole file.
        document: what TOML made of it.

    Every method raises ValueError, naming the table, the name and what was expected.

    """

    def __init__(self, name: str, document: object) -> None:
        self.name = name
        if not isinstance(document, dict):
            # One error for whatever is wrong with the file.
            raise ValueError(f"{self._place()} must be a table")  # noqa: TRY004
        self._document: dict[str, Any] = document
        self._known: list[str] = []

    def text(
        self, name: str, default: object = _ANY, *, may_be_empty: bool = False
    ) -> str:
        """The text of that name; not empty unless that is allowed."""
        value = self._value(name, default)
        if not isinstance(value, str) or not (value or may_be_empty):
            raise ValueError(f"{self._place(name)} must be a text, not {value!r}")
        return value

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        """The text of that name, which must be one of those."""
        value = self.text(name)
        if value not in known:
            raise ValueError(
                f"{self._place(name)} must be one of {', '.join(known)}, not {value!r}"
            )
        return value

    def number(self, name: str, least: float) -> float:
        """The number of that name: finite, and not below the least."""
        value = self._value(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < least:
            raise ValueError(
                f"{self._place(name)} must be a number of at least {least:g}, "
                f"not {value!r}"
            )
        return float(value)

    def whole_number(self, name: str, least: int, greatest: int) -> int:
        """The whole number of that name, within those bounds."""
        value = self._value(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not least <= value <= greatest:
            raise ValueError(
                f"{self._place(name)} must be a whole number from {least} to "
                f"{greatest}, not {value!r}"
            )
        return int(value)

    def texts(self, name: str, default: object = _ANY) -> tuple[str, ...]:
        """The list of texts of that name, none of them empty."""
        value = self._value(name, default)
        if not isinstance(value, list | tuple) or not all(
            isinstance(each, str) and each for each in value
        ):
            raise ValueError(f"{self._place(name)} must be a list of texts")
        return tuple(value)

    def whole_numbers(self, name: str, least: int, greatest: int) -> tuple[int, ...]:
        """The list of whole numbers of that name: one at least, within those bounds."""
        value = self._value(name)
        if (
            not isinstance(value, list)
            or not value
            or not all(
                isinstance(each, int)
                and not isinstance(each, bool)
                and least <= each <= greatest
                for each in value
            )
        ):
            raise ValueError(
                f"{self._place(name)} must be a list of whole numbers from {least} to "
                f"{greatest}"
            )
        return tuple(value)

    def table(self, name: str, default: object = _ANY) -> "ClosedTable":
        """The table of that name."""
        inner = f"{self.name}.{name}" if self.name else name
        return ClosedTable(inner, self._value(name, default))

    def tables(self, name: str) -> Iterator["ClosedTable"]:
        """The tables of that name, `[[…]]`; one at least."""
        value = self._value(name)
        if not isinstance(value, list) or not value:
            raise ValueError(f"{self._place(name)} must be a list of tables")
        inner = f"{self.name}.{name}" if self.name else name
        for number, each in enumerate(value, 1):
            yield ClosedTable(f"{inner} number {number}", each)

    def names(self) -> tuple[str, ...]:
        """All of its names, which are the user's own: any is known."""
        self._known += self._document
        return tuple(self._document)

    def has(self, name: str) -> bool:
        """Whether the name is there; it is known from now on."""
        self._known.append(name)
        return name in self._document

    def close(self) -> None:
        """Refuse every name that nobody has asked for."""
        for name in self._document:
            if name in self._known:
                continue
            near = difflib.get_close_matches(name, self._known, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            known = ", ".join(sorted(set(self._known)))
            raise ValueError(
                f"{self._place()} has the unknown name {name!r}{meant}; known: {known}"
            )

    def _value(self, name: str, default: object = _ANY) -> Any:
        self._known.append(name)
        if name in self._document:
            return self._document[name]
        if default is _ANY:
            raise ValueError(f"{self._place()} must have {name!r}")
        return default

    def _place(self, name: str = "") -> str:
        table = f"[{self.name}]" if self.name else "the file"
        return f"{table}: {name!r}" if name else table
