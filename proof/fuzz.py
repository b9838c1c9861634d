"""`python -m proof.fuzz`: bad input at the front door, with good orders between.

Owns the command, the search, the progress, the report and the exit status: 0 green, 1
something was found, 2 the instrument itself is broken, 130 interrupted. Must never
soften a verdict, or leave a process behind.
"""

import json
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from hypothesis import HealthCheck, Phase, given, reproduce_failure, seed, settings
from hypothesis import __version__ as hypothesis_version
from hypothesis.errors import DidNotReproduce, Flaky, InvalidArgument
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from demo.processes import PartFailed
from demo.server_process import PROJECT, ServerError, ServiceMissing
from proof.bent_requests import Exchange, delivery_of, exchanges, new_order
from proof.door_judge import Footprint, Found
from proof.door_stage import SOURCE, Ledger, Stage, staged
from proof.examination import Examination, footprint_of

DIRECTORY: Final = PROJECT / "build" / "fuzz"
REQUESTS: Final = 20_000
#: About a minute.
REQUESTS_SHORT: Final = 1_500
#: Of one search of Hypothesis, which remembers what it has drawn.
_EXCHANGES: Final = 200
_WARM_UP_ORDERS: Final = 200
_THREADS: Final = 8
_BROKEN: Final = 2
_INTERRUPTED: Final = 130
_BLOB: Final = re.compile(r"reproduce_failure\('[^']*', b'([^']*)'\)")

_SETTINGS: Final = settings(
    max_examples=_EXCHANGES,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    print_blob=True,
)


@dataclass(frozen=True)
class Find:
    """A broken rule, with the smallest exchange that breaks it."""

    rule: str
    #: Replays it: `--replay`; empty if it could not be repeated, or is of the end.
    blob: str = ""


def search(
    examination: Examination,
    *,
    requests: int,
    start: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Find | None:
    """Send about so many requests, until a rule is broken; None if none is.

    Args:
        examination: of the server.
        requests: how many to send.
        start: the seed; the same one draws the same exchanges.
        advance: is told how many were sent, after each exchange.

    """
    number = start
    while examination.sent.total() < requests:
        attempt = _Attempt(examination, requests, advance)
        find = attempt.find(seed(number))
        if find is not None:
            return find
        number += 1
    return None


def replay(examination: Examination, blob: str) -> Find | None:
    """Play the exchange that a find named; None if no rule is broken by it."""
    attempt = _Attempt(examination, sys.maxsize, lambda _: None)
    return attempt.find(reproduce_failure(hypothesis_version, blob.encode()))


class _Attempt:
    """One search of Hypothesis, and what it has found."""

    def __init__(
        self, examination: Examination, requests: int, advance: Callable[[int], None]
    ) -> None:
        self._examination = examination
        self._requests = requests
        self._advance = advance
        self._found = ""

    def find(self, decorator: Callable[..., Any]) -> Find | None:
        """Search, as the decorator says; None if no rule was broken."""
        try:
            decorator(_SETTINGS(given(exchanges())(self._examine)))()
        except Found as found:
            blob = _BLOB.search("\n".join(getattr(found, "__notes__", [])))
            return Find(str(found), blob[1] if blob else "")
        except Flaky as flaky:
            return Find(f"once, and not again: {self._found or flaky}")
        except DidNotReproduce:
            return None
        return None

    def _examine(self, exchange: Exchange) -> None:
        # What was found is made smaller, however many requests that takes.
        if not self._found and self._examination.sent.total() >= self._requests:
            return
        try:
            self._examination.examine(exchange)
        except Found as found:
            self._found = str(found)
            raise
        finally:
            self._advance(self._examination.sent.total())


def warm_up(examination: Examination) -> None:
    """Make every thread and connection that the function keeps, and fill its caches."""
    orders = [delivery_of(new_order(), "warm-up") for _ in range(_WARM_UP_ORDERS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(examination.deliver, orders))


def run(
    directory: Path,
    ledger: Ledger,
    *,
    requests: int,
    start: int,
    blob: str,
    console: Console,
    source: Path = SOURCE,
) -> bool:
    """Play it all, and write the report; returns whether nothing was found.

    Raises:
        PartFailed, ServerError, ServiceMissing: a part does not start.

    """
    began_s = time.monotonic()
    with staged(directory, ledger, source) as stage:
        examination, worker = stage.examination, stage.function.worker
        find, before, after = None, None, None
        try:
            warm_up(examination)
            before = footprint_of(worker)
            with _progress(console, requests) as advance:
                find = (
                    replay(examination, blob)
                    if blob
                    else search(
                        examination, requests=requests, start=start, advance=advance
                    )
                )
            if find is None:
                if stage.function.worker != worker:
                    raise Found("the worker died and was started again")  # noqa: TRY301
                after = examination.finish(worker, before)
        except Found as found:
            find = Find(str(found))
        report = _report(stage, find, before, after)
    report |= {"seed": start, "seconds": round(time.monotonic() - began_s, 1)}
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    _tell(console, report, find)
    return find is None


def _report(
    stage: Stage, find: Find | None, before: Footprint | None, after: Footprint | None
) -> dict[str, object]:
    examination = stage.examination
    stage.evidence.read()
    return {
        "verdict": "red" if find else "green",
        "find": find.rule if find else None,
        "replay": find.blob if find else None,
        "requests": examination.sent.total(),
        "sent": dict(examination.sent.most_common()),
        "answered": {
            str(status or "closed"): times
            for status, times in sorted(examination.answered.items())
        },
        "good_orders": len(examination.orders),
        "executed": stage.evidence.executed,
        "executed_twice": len(stage.evidence.doubles),
        "quarantined": stage.evidence.quarantined,
        "before": before.to_json() if before else None,
        "after": after.to_json() if after else None,
    }


def _tell(console: Console, report: dict[str, object], find: Find | None) -> None:
    names = ("requests", "good_orders", "executed", "executed_twice", "quarantined")
    for name in (*names, "answered", "before", "after", "seed", "seconds"):
        console.print(f"{name.replace('_', ' '):<15}{report[name]}")
    console.print("everything in build/fuzz/report.json")
    if find is None:
        text = "GREEN: every request got a documented answer or a closed connection."
        console.print(text, style="bold green")
        return
    console.print(f"RED: {find.rule}", style="bold red")
    if find.blob:
        console.print(f"Again: python -m proof.fuzz --replay '{find.blob}'")


@contextmanager
def _progress(console: Console, requests: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("requests", total=requests)
        yield lambda sent: progress.update(task, completed=sent)


@click.command()
@click.option(
    "--short", is_flag=True, help=f"{REQUESTS_SHORT} requests, about a minute."
)
@click.option("--requests", type=click.IntRange(1), help="About how many to send.")
@click.option("--seed", "start", type=int, help="The same seed, the same exchanges.")
@click.option("--replay", "blob", default="", help="The exchange that a find named.")
@click.option(
    "--ledger",
    type=click.Choice(["sqlite", "mariadb"]),
    default="sqlite",
    help="A file, or a private MariaDB.",
)
def main(
    *, short: bool, requests: int | None, start: int | None, blob: str, ledger: Ledger
) -> None:
    """Send what nobody should send, and judge what comes back and what is then true."""
    # As Ctrl-C: every part is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir(parents=True)
    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=True)
    try:
        is_green = run(
            DIRECTORY,
            ledger,
            requests=requests or (REQUESTS_SHORT if short else REQUESTS),
            start=secrets.randbelow(2**32) if start is None else start,
            blob=blob,
            console=console,
        )
    except InvalidArgument:
        click.echo("fuzz: --replay: say what a find has named", err=True)
        sys.exit(_BROKEN)
    except (PartFailed, ServerError, ServiceMissing) as error:
        click.echo(f"fuzz: {error}", err=True)
        sys.exit(_BROKEN)
    except KeyboardInterrupt:
        click.echo("fuzz: interrupted; every process is stopped", err=True)
        sys.exit(_INTERRUPTED)
    sys.exit(0 if is_green else 1)


if __name__ == "__main__":
    main()
