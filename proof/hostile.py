"""`python -m proof.hostile`: is an order ever settled by an answer that is not its own.

Owns the command, the progress, the report and the exit status: 0 green, 1 something was
found, 2 the instrument itself is broken, 130 interrupted. Must never soften a verdict,
or leave a process behind.

A recharge API that is hostile at the level of bytes answers the deployed function:
interim answers, answers split and joined, two to one request, wrong lengths, late bytes
(hostile_answers.py). What it did and meant stands in its own book, and that judges.
"""

import json
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from demo.processes import PartFailed
from demo.server_process import PROJECT, ServerError
from proof.hostile_answers import Meaning
from proof.hostile_api import Book, HostileApi
from proof.hostile_judge import judge
from proof.hostile_stage import Kind, Played, play, staged

DIRECTORY: Final = PROJECT / "build" / "hostile"
KINDS: Final[tuple[Kind, ...]] = ("none", "lookup")
#: Of each kind.
SECONDS: Final = 300.0
SECONDS_SHORT: Final = 22.0
_ORDERS_MAX: Final = 1_000_000
#: Most growth of the function's memory, in KiB: a bomb of 20 MB is never unpacked.
_RSS_KIB_MORE_MAX: Final = 60_000
_BROKEN: Final = 2
_INTERRUPTED: Final = 130


def find(
    directory: Path,
    kind: Kind,
    *,
    seed: int,
    seconds: float,
    orders: int = _ORDERS_MAX,
    source: str = "function/main.py",
) -> tuple[list[str], dict[str, Any]]:
    """Play one kind; returns every fault, and the figures.

    Args:
        directory: made anew, for the ledger and the logs.
        kind: of the API.
        seed: the same one draws the same answers, in the order of connections.
        seconds: for how long orders are begun.
        orders: no more than so many.
        source: the file with `handle_topup`.

    Raises:
        PartFailed: a part does not start.

    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    columns = (TextColumn(f"orders, kind {kind}"), BarColumn(), MofNCompleteColumn())
    with HostileApi(seed) as api, staged(directory, api, kind, source) as stage:
        with Progress(*columns, console=_console()) as progress:
            task = progress.add_task("orders", total=None)
            played = play(
                stage,
                seconds=seconds,
                orders=orders,
                advance=lambda: progress.advance(task),
            )
        book = api.book
    faults = judge(played.rows, played.told, book.calls, book.raced)
    faults += played.unanswered
    log = (directory / "function.log").read_text("utf-8", "replace")
    faults += [line for line in log.splitlines() if '"unforeseen"' in line]
    if book.unreadable:
        faults.append(f"{book.unreadable} requests were no requests")
    if not played.is_same_worker:
        faults.append("the function's process ended, or was started again")
    if played.rss_kib_after > played.rss_kib_before + _RSS_KIB_MORE_MAX:
        faults.append(
            f"the function grew from {played.rss_kib_before} to "
            f"{played.rss_kib_after} KiB"
        )
    return faults, _figures(kind, played, book)


def _figures(kind: Kind, played: Played, book: Book) -> dict[str, Any]:
    calls = [call for each in book.calls.values() for call in each]
    return {
        "kind": kind,
        "orders": len(played.told),
        "answered": {str(status): n for status, n in sorted(played.answers.items())},
        "ledger": dict(Counter(row.status for row in played.rows.values())),
        "calls": len(calls),
        "executed": sum(call.is_executed for call in calls),
        "look_ups": book.look_ups,
        "meant": dict(Counter(str(call.meaning) for call in calls)),
        "dressings": dict(book.dressings.most_common()),
        "not_judged": len(book.raced),
        "rss_kib": [played.rss_kib_before, played.rss_kib_after],
    }


def proves_nothing(figures: dict[str, Any]) -> str:
    """Say why, or nothing: each end and each meaning must have been there."""
    # What is parked the resolver may have settled by now.
    ends = {"succeeded", "rejected"} | (
        {"parked"} if figures["kind"] == "none" else set()
    )
    missing = ends - set(figures["ledger"])
    missing |= {str(each) for each in Meaning} - set(figures["meant"])
    return f"nothing was {', '.join(sorted(missing))}" if missing else ""


def _console() -> Console:
    return Console(highlight=False, emoji=False, markup=False, soft_wrap=True)


def _tell(faults: Sequence[str], report: dict[str, Any]) -> None:
    console = _console()
    for kind in KINDS:
        for name, value in report[kind].items():
            console.print(f"{name.replace('_', ' '):<12}{value}")
        console.print()
    console.print(f"seed {report['seed']}, {report['seconds']} s")
    console.print("everything in build/hostile/report.json")
    if not faults:
        text = "GREEN: no order was settled by an answer that was not its own."
        console.print(text, style="bold green")
        return
    for fault in faults[:20]:
        console.print(fault)
    console.print(f"RED: {len(faults)} faults", style="bold red")


@click.command()
@click.option("--short", is_flag=True, help="Less than a minute.")
@click.option("--seconds", type=click.FloatRange(1), help="For how long, each kind.")
@click.option("--seed", type=int, help="The same seed, the same answers.")
def main(*, short: bool, seconds: float | None, seed: int | None) -> None:
    """Answer the function as no recharge API should, and judge how orders end."""
    # As Ctrl-C: every part is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began_s = time.monotonic()
    seed = secrets.randbelow(2**32) if seed is None else seed
    seconds = seconds or (SECONDS_SHORT if short else SECONDS)
    faults: list[str] = []
    report: dict[str, Any] = {"seed": seed}
    try:
        for kind in KINDS:
            found, figures = find(DIRECTORY / kind, kind, seed=seed, seconds=seconds)
            faults += found
            report[kind] = figures
            if not found and (why := proves_nothing(figures)):
                click.echo(f"hostile: the run proves nothing: {why}", err=True)
                sys.exit(_BROKEN)
    except (PartFailed, ServerError) as error:
        click.echo(f"hostile: {error}", err=True)
        sys.exit(_BROKEN)
    except KeyboardInterrupt:
        click.echo("hostile: interrupted; every process is stopped", err=True)
        sys.exit(_INTERRUPTED)
    report |= {
        "verdict": "red" if faults else "green",
        "faults": faults,
        "seconds": round(time.monotonic() - began_s, 1),
    }
    text = json.dumps(report, indent=2)
    (DIRECTORY / "report.json").write_text(text + "\n", "utf-8")
    _tell(faults, report)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
