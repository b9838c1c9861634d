"""What the run leaves: build/crash/report.json, and the table of the docs.

Owns the shape of both. It must never round a finding away: a red cell is red in both.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from demo.recharge_api import Kind
from proof.crash_matrix.cells import BOUNDARIES, Behaviour, Cell, expected
from proof.crash_matrix.judging import Observation
from proof.crash_matrix.wires import FIRST

_MEANING_OF_KIND: Final = {
    Kind.REPLAY: "a repeated key is answered with the first result",
    Kind.REFUSE: "a repeated key is refused, and can be looked up",
    Kind.LOOKUP: "a key can be looked up, and a second use is executed",
    Kind.NONE: "neither: nobody but a person can find out",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One cell, played."""

    cell: Cell
    #: None: it did not come to its end; `findings` says why.
    seen: Observation | None
    findings: Sequence[str]

    @property
    def is_red(self) -> bool:
        """Whether anything is not as promised."""
        return bool(self.findings)

    def as_json(self) -> dict[str, object]:
        """Its part of the report."""
        return {
            "boundary": str(self.cell.boundary),
            "behaviour": self.cell.behaviour.value,
            "kind": self.cell.kind.value,
            "unreachable": expected(self.cell).unreachable,
            "findings": list(self.findings),
            **(_seen_as_json(self.seen) if self.seen else {}),
        }


def _seen_as_json(seen: Observation) -> dict[str, object]:
    return {
        **asdict(seen),
        "executions": seen.executed.count(FIRST),
        "final_state": seen.statuses.get(FIRST, ""),
        "redeliveries": seen.redeliveries,
    }


@dataclass(frozen=True, slots=True)
class Figures:
    """The sums over all cells."""

    cells: int
    #: Victims that died by SIGKILL at their boundary.
    kills: int
    #: Cells whose boundary can't be reached, and was not.
    unreachable: int
    executions: int
    #: Orders that were executed more than once.
    doubles: int
    parked: int
    red: int

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Figures":
        """Add up."""
        seen = [result.seen for result in results if result.seen]
        return cls(
            cells=len(results),
            kills=sum(each.was_killed for each in seen),
            unreachable=sum(not each.was_killed for each in seen),
            executions=sum(len(each.executed) for each in seen),
            doubles=sum(
                each.executed.count(name) > 1
                for each in seen
                for name in set(each.executed)
            ),
            parked=sum(each.statuses.get(FIRST) == "parked" for each in seen),
            red=sum(result.is_red for result in results),
        )


def write_json(path: Path, results: Sequence[Result], facts: Mapping[str, str]) -> None:
    """Write the report."""
    document = {
        **facts,
        **asdict(Figures.of(results)),
        "matrix": [result.as_json() for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def markdown(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    """The page of the docs: the figures, and a table a kind."""
    return "\n".join(_lines(results, facts)) + "\n"


def _lines(results: Sequence[Result], facts: Mapping[str, str]) -> Iterator[str]:
    figures = Figures.of(results)
    yield from _HEAD
    yield ""
    yield "| figure | |"
    yield "|---|--:|"
    yield f"| cells | {figures.cells} |"
    yield f"| killed by SIGKILL at their boundary | {figures.kills} |"
    yield f"| boundary can't be reached, and was not | {figures.unreachable} |"
    yield f"| executions, by the API's book | {figures.executions} |"
    yield f"| **executed twice** | **{figures.doubles}** |"
    yield f"| parked for a person, in the ledger | {figures.parked} |"
    yield f"| not as promised | {figures.red} |"
    yield ""
    yield ", ".join(f"{what} {fact}" for what, fact in facts.items())
    by_cell = {result.cell: result for result in results}
    for kind in Kind:
        yield ""
        yield f"## Kind `{kind.value}`: {_MEANING_OF_KIND[kind]}"
        yield ""
        names = [behaviour.value.replace("_", " ") for behaviour in Behaviour]
        yield f"| killed at | {' | '.join(names)} |"
        yield "|---|" + ":-:|" * len(names)
        for boundary in BOUNDARIES:
            row = [by_cell.get(Cell(boundary, each, kind)) for each in Behaviour]
            words = [_word(result) for result in row]
            yield f"| `{boundary}` | {' | '.join(words)} |"
    reds = [result for result in results if result.is_red]
    if reds:
        yield ""
        yield "## Not as promised"
        yield ""
        for result in reds:
            yield f"- `{result.cell}`: {'; '.join(result.findings)}"


_HEAD: Final = """\
# The crash matrix

Who is killed where, under which behaviour of which kind of recharge API, and how often
the API executed the order in the end.
`make crash PAGE=docs/crash-matrix.md` makes this page; `make crash SHORT=1` plays every
boundary with every kind, two behaviours each.

Each cell has its own ledger on MariaDB, its own sandbox API with its book, and
processes of its own; the function runs unchanged under gunicorn.
It reaches its caller, its database and the API only through proxies that read what
passes (`proof/crash_matrix/wires.py`).
At the boundary its whole process group gets SIGKILL, and nothing of it passes any more;
the request that was under way must end without a response.
Then a new process takes over, a faithful source delivers again, a resolver runs, and
the API's book is read after everything has ended.
A cell is green only if also the subscriber's next order ran after it and once, another
subscriber did not wait, the ledger agrees with the book, and every order, delivered
once more, is answered as the contract says.

- `1`: executed once, succeeded.
- `no`: refused by the API, never executed, rejected.
- `P0`, `P1`: parked for a person, executed never or once; the subscriber's next order
  is held behind it.
- In brackets: the boundary can't be reached under that behaviour, which is checked;
  how the order ends without that death.
- `resolver_…`: the resolver dies while it runs two held orders or, at `look_up` and
  `verdict`, while it settles what a dead function has left.
""".splitlines()


def _word(result: Result | None) -> str:
    """One cell of the table."""
    if result is None or result.seen is None:
        return "" if result is None else "**?**"
    seen = result.seen
    times, status = seen.executed.count(FIRST), seen.statuses.get(FIRST)
    word = {"succeeded": f"{times}", "rejected": "no", "parked": f"P{times}"}.get(
        str(status), str(status)
    )
    if result.is_red:
        return f"**{word}!**"
    return word if seen.was_killed else f"({word})"
