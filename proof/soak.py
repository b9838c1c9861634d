"""`python -m proof.soak`: everything at once, for minutes, against a seeded nemesis.

Owns the command, the progress, the report and the exit status: 0 green, 1 something was
found, 2 the instrument itself is broken, 130 interrupted. Must never soften the
verdict, which the judge reads from the recharge API's own book, or leave a process
behind.
"""

import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from confluent_kafka import KafkaException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from demo.grounds import TOPIC
from demo.judge import judge
from demo.processes import PartFailed
from demo.server_process import PROJECT, ServerError, ServiceMissing
from demo.stage import delivered_by
from demo.strimzi_users import PRODUCER, SOURCE
from demo.subject import GROUP
from demo.traces import emptied, shown
from function.config import Settings
from function.database import make_engine
from proof import timeline
from proof.cluster import PARTITIONS, SETTLE_S, Cluster
from proof.meter import Meter, unfinished
from proof.nemesis import Incident, Nemesis, schedule
from proof.person import Person
from proof.traffic import SUBSCRIBERS, Traffic, number_of
from proof.verdict import Found, calls_spoiled

KINDS: Final = ("replay", "refuse", "lookup", "none")
_BROKEN: Final = 2
_INTERRUPTED: Final = 130
_DIRECTORY: Final = PROJECT / "build" / "soak"
#: The share of recharges that chance spoils, beside what the nemesis does.
_FAULT_RATE: Final = 0.01
#: Orders a second, if the machine can.
_RATE_MAX: Final = 100.0
#: What is parked is tried again after up to twice its own time.
_DRAIN_S: Final = 180.0
#: What both servers must hold alike at the end.
_TABLES: Final = ("topup", "attempt", "quarantine", "decision")
_POLL_S: Final = 0.5
_LINE_EVERY_S: Final = 15.0
_KEYS_SHOWN_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Options:
    """What a run was asked for."""

    minutes: float
    seed: int
    kind: str
    is_naive: bool
    rate_max: float
    drain_s: float
    directory: Path


@dataclass(frozen=True, slots=True)
class _Running:
    """The parts of a run that is under way."""

    cluster: Cluster
    #: Past every fault; None: the naive design has none that could be read.
    ledger: Engine | None
    meter: Meter
    traffic: Traffic
    nemesis: Nemesis
    person: Person | None


def soak(options: Options, console: Console) -> int:
    """Start everything, break it for minutes, let it drain and judge it.

    Returns the exit status.

    Raises:
        ServiceMissing: a program is not there.
        ServerError: a server does not start, or does not come back.
        PartFailed: a part does not do its part; names the log to read.

    """
    began_s = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(emptied(options.directory, "soak"))
        logging.basicConfig(
            filename=options.directory / "soak.log",
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(message)s",
        )
        incidents = schedule(options.seed, options.minutes * 60, options.kind)
        _say_what_comes(console, options, incidents)
        running = _start(stack, options, incidents)
        console.print(f"Everything runs after {time.monotonic() - began_s:.0f} s.")
        faults_began_s = time.monotonic()
        _break(running, options, console)
        faults_s = time.monotonic() - faults_began_s
        under_faults = running.meter.tally.executed
        running.cluster.mend()
        running.traffic.stop()
        drain_s = _drain(running, options, console)
        found = _judge(running, seconds=time.monotonic() - began_s)
        report = _report(running, found, options) | {
            "executed_under_faults": under_faults,
            "recharges_per_s_under_faults": round(under_faults / faults_s, 1),
            "drain_s": round(drain_s, 1),
        }
        _write(running, found, report, options, faults_s)
    _say_verdict(console, found, report, options)
    return found.exit_status


def _start(
    stack: ExitStack, options: Options, incidents: Sequence[Incident]
) -> _Running:
    """Start the parts; the nemesis and the traffic begin at once."""
    cluster = stack.enter_context(
        Cluster(
            options.directory,
            kind=options.kind,
            is_naive=options.is_naive,
            seed=options.seed,
            fault_rate=_FAULT_RATE,
        )
    )
    cluster.start()
    ledger = None if options.is_naive else _engine(cluster)
    meter = Meter(
        cluster.book.path,
        ledger,
        cluster.kafka_config(SOURCE),
        group=GROUP,
        topic=TOPIC,
        partitions=PARTITIONS,
    )
    traffic = Traffic(
        options.seed,
        cluster.kafka_config(PRODUCER),
        TOPIC,
        rate_max=options.rate_max,
        waiting=lambda orders: orders - meter.done,
        has_refused=not options.is_naive,
    )
    subscribers = [number_of(rank) for rank in range(SUBSCRIBERS)]
    nemesis = Nemesis(cluster, incidents, subscribers)
    person = None
    if ledger is not None and options.kind == "none":
        person = Person(ledger, cluster.book, settle_s=SETTLE_S)
    for part in (meter, traffic, nemesis):
        stack.enter_context(part)
    return _Running(cluster, ledger, meter, traffic, nemesis, person)


def _engine(cluster: Cluster) -> Engine:
    """A way to the ledger that no fault disturbs."""
    return make_engine(Settings.from_env(cluster.ledger_env()))


def _break(running: _Running, options: Options, console: Console) -> None:
    """Let the nemesis do its work for as long as was asked for."""
    seconds = options.minutes * 60
    end_s = time.monotonic() + seconds
    _watch(running, console, "faults", seconds, lambda: time.monotonic() >= end_s)
    running.nemesis.stop()
    _require_nemesis(running)


def _drain(running: _Running, options: Options, console: Console) -> float:
    """Wait until everything has come to its end; returns how long it took.

    What has not after `drain_s` is left to the verdict.
    """
    began_s = time.monotonic()

    def is_over() -> bool:
        if time.monotonic() - began_s > options.drain_s:
            return True
        if running.person is not None:
            running.person.decide()
        if running.meter.ask_lag() != 0:
            return False
        if running.ledger is None:
            return True
        try:
            return not unfinished(running.ledger)
        except SQLAlchemyError:
            # A connection of before a failover; the next one will do.
            return False

    _watch(running, console, "drain", options.drain_s, is_over)
    return time.monotonic() - began_s


def _watch(
    running: _Running,
    console: Console,
    what: str,
    seconds: float,
    is_over: Callable[[], bool],
) -> None:
    """Show how it goes until it is over, and start again what ends by itself."""
    began_s = line_s = time.monotonic()
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
    is_terminal = console.is_terminal
    with Progress(
        *columns, console=console, transient=True, disable=not is_terminal
    ) as bar:
        task = bar.add_task(what, total=seconds)
        while not is_over():
            _require_nemesis(running)
            running.cluster.revive()
            now_s = time.monotonic()
            text = f"{what} {now_s - began_s:4.0f} s: {_state(running)}"
            bar.update(task, completed=now_s - began_s, description=text)
            if not is_terminal and now_s - line_s >= _LINE_EVERY_S:
                line_s = now_s
                console.print(text)
            time.sleep(_POLL_S)


def _require_nemesis(running: _Running) -> None:
    if running.nemesis.failure is not None:
        raise running.nemesis.failure


def _judge(running: _Running, *, seconds: float) -> Found:
    cluster, ledger = running.cluster, running.ledger
    if ledger is not None:
        # Connections of before a failover would be found out one by one.
        ledger.dispose()
    subject = cluster.subject()
    sent = running.traffic.sent()
    verdict = judge(
        sent,
        cluster.book.stream(),
        subject.view(),
        names=subject.names(sent),
        delivered=delivered_by(cluster.journals()),
        seconds=seconds,
    )
    tables = [f"ledger.{name}" for name in _TABLES]
    return Found(
        verdict,
        unfinished={} if ledger is None else unfinished(ledger),
        lag=running.meter.ask_lag(),
        are_replicas_equal=ledger is None or cluster.database.are_equal(tables),
    )


# -- What is told ----------------------------------------------------------------------


def _report(running: _Running, found: Found, options: Options) -> dict[str, object]:
    """Everything that was seen, for report.json."""
    faults = running.nemesis.happened()
    spoiled = calls_spoiled(running.cluster.book.stream())
    return {
        "green": found.is_green,
        "problems": found.problems,
        "seed": options.seed,
        "minutes": options.minutes,
        "kind": options.kind,
        "naive": options.is_naive,
        "unfinished": found.unfinished,
        "lag": found.lag,
        "replicas_equal": found.are_replicas_equal,
        **found.verdict.as_json(),
        "faults": len(faults),
        "faults_by_kind": running.nemesis.counts(),
        "failovers": sum("failover" in each.name for each in faults),
        "calls_spoiled": sum(spoiled.values()),
        "calls_spoiled_by_kind": spoiled,
        "parts_revived": running.cluster.revived,
        "decisions_of_a_person": running.person.decisions if running.person else 0,
        "subscribers": SUBSCRIBERS,
        "partitions": PARTITIONS,
        "timeline": [asdict(each) for each in faults],
    }


def _write(
    running: _Running,
    found: Found,
    report: dict[str, object],
    options: Options,
    faults_s: float,
) -> None:
    (options.directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    timeline.draw(
        options.directory / "timeline.png",
        running.meter.samples,
        running.nemesis.happened(),
        faults_end_s=faults_s,
        title=f"{found.verdict.executed} recharges of kind {options.kind}, "
        f"{report['faults']} faults, {report['failovers']} failovers, "
        f"seed {options.seed}: {'green' if found.is_green else 'RED'}",
    )


def _state(running: _Running) -> str:
    """The moment in one line."""
    samples = running.meter.samples[-6:]
    if len(samples) < 2:  # noqa: PLR2004 # a rate needs two moments.
        return "begins"
    first, last = samples[0], samples[-1]
    rate = (last.executed - first.executed) / (last.at_s - first.at_s)
    lag = "?" if last.lag is None else last.lag
    unsettled = "?" if last.unsettled is None else sum(last.unsettled.values())
    faults = ", ".join(each.name for each in running.nemesis.running()) or "no fault"
    return (
        f"{last.executed} executed, {rate:.0f}/s, lag {lag}, "
        f"unsettled {unsettled}; {faults}"
    )


def _say_what_comes(
    console: Console, options: Options, incidents: Sequence[Incident]
) -> None:
    who = "the article's own design" if options.is_naive else "the function"
    console.print(
        f"Soak of {who}: {options.minutes:g} minutes, {len(incidents)} faults planned, "
        f"a recharge API of kind {options.kind}. Traces: {shown(options.directory)}\n"
        f"SEED={options.seed} repeats the orders, the planned faults and what chance "
        "does to each call; not which record a fault meets, nor how long a restart "
        "takes."
    )


def _say_verdict(
    console: Console, found: Found, report: dict[str, object], options: Options
) -> None:
    verdict = found.verdict
    for name in (
        *("sent", "unique", "executed", "rejected", "quarantined", "calls"),
        *("redeliveries", "dead_lettered", "recharges_per_s_under_faults"),
        *("faults", "calls_spoiled", "failovers", "drain_s"),
        *("double", "missing", "out_of_order", "misjudged"),
    ):
        console.print(f"{name.replace('_', ' '):<30}{report[name]!s:>10}")
    for what, keys in (
        ("double", verdict.double_keys),
        ("missing", verdict.missing_keys),
        ("out of order", verdict.out_of_order_keys),
        ("misjudged", verdict.misjudged_keys),
    ):
        if keys:
            more = " ..." if len(keys) > _KEYS_SHOWN_MAX else ""
            console.print(f"{what}: {', '.join(keys[:_KEYS_SHOWN_MAX])}{more}")
    if found.is_green:
        text = (
            f"GREEN: {verdict.executed} recharges under {report['faults']} faults, "
            "each exactly once and in order. Nothing is missing."
        )
    else:
        text = f"RED: {'; '.join(found.problems)}."
    console.print(text, style="bold green" if found.is_green else "bold red")
    console.print(
        f"{verdict.seconds:g} s; {shown(options.directory)}/report.json and "
        "timeline.png"
    )


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="How long the faults go on; start and drain come on top.",
)
@click.option("--seed", type=int, help="Of orders and faults.  [default: by chance]")
@click.option("--kind", type=click.Choice(KINDS), default="replay", show_default=True)
@click.option(
    "--naive",
    is_flag=True,
    help="Put the article's own design on trial, which ends red.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=1),
    default=_RATE_MAX,
    show_default=True,
    help="Most orders a second; the producers wait for what is slower.",
)
@click.option(
    "--drain",
    type=click.FloatRange(min=1),
    default=_DRAIN_S,
    show_default=True,
    help="Seconds after the faults until what has no end is a find.",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=_DIRECTORY,
    help="Gets all traces.  [default: build/soak]",
)
def main(
    *,
    minutes: float,
    seed: int | None,
    kind: str,
    naive: bool,
    rate: float,
    drain: float,
    directory: Path,
) -> None:
    """Look for a double, a loss or a wrong order, with everything breaking at once."""
    # As Ctrl-C: every part is killed on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = Options(
        minutes=minutes,
        seed=secrets.randbelow(10**6) if seed is None else seed,
        kind=kind,
        is_naive=naive,
        rate_max=rate,
        drain_s=drain,
        directory=directory.absolute(),
    )
    console = Console(highlight=False, emoji=False, markup=False)
    try:
        status = soak(options, console)
    except (
        PartFailed,
        ServerError,
        ServiceMissing,
        KafkaException,
        SQLAlchemyError,
    ) as error:
        click.echo(f"soak: {error}", err=True)
        status = _BROKEN
    except KeyboardInterrupt:
        click.echo("soak: interrupted; every process is killed", err=True)
        status = _INTERRUPTED
    sys.exit(status)


if __name__ == "__main__":
    main()
