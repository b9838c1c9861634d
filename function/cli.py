"""The `topup` command: what operators and the migration Job run.

Owns the words of the command line; must never change an order by a way of its own.

Exit status: 0 done, 1 refused or failed (one line `topup: …` on standard error),
2 used wrongly. `reconcile` has its own: 0 matched, 1 differences, 2 not compared; and
`doctor`: 0 nothing is wrong, 1 an error, 2 nothing to look at, 3 not all is known.
"""

import json
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import click
from sqlalchemy import Engine

from function import telemetry
from function.api_profile import load_profile
from function.config import Settings
from function.database import make_engine
from function.doctor.command import doctor, plan
from function.durations import UNIT_S, age_s
from function.errors import LedgerUnavailable, TopupError
from function.grants import script
from function.migrate import migrate as run_migrations
from function.migrate import note_api
from function.model import Status
from function.operations import EVERYTHING, Filters, Operations, OrderRow, Verdict
from function.reconcile import COLUMNS, EXECUTED, Format, Summary
from function.reconcile import reconcile as compare
from function.replay import (
    Letter,
    Report,
    Selection,
    from_file,
    from_quarantine,
    post,
    read_properties,
    spool_topic,
)
from function.retention import Horizon, Retention
from function.rules import rules_of

#: What the database's numbers mean to a person at a terminal.
_HINTS: Final = {
    "1044": "this database account may not use the ledger",
    "1045": "the database refuses the account or its password",
    "1142": "this database account has no right to do that (see `topup grants`)",
    "1143": "this database account has no right to do that (see `topup grants`)",
    "1146": "a table is missing: run `topup migrate`",
    "1290": "the database is read-only: a replica, or a failover under way",
    "2003": "the database can't be reached",
}
#: A century; more overflows the database's arithmetic.
_AGE_S_MAX: Final = 36_500 * UNIT_S["d"]
_SUBSCRIBER: Final = re.compile(r"\+[1-9][0-9]{3,14}|~[A-Z2-7]{15}")


class _Commands(click.Group):
    """Turns what the project raises on purpose into one line and a status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except LedgerUnavailable as error:
            number = str(error).rpartition(" ")[2]
            hint = _HINTS.get(number, "the ledger can't be used now")
            click.echo(f"topup: {hint} ({error})", err=True)
        except TopupError as error:
            lines = map(_printable, str(error).split("\n"))
            click.echo("\n".join(["topup: " + next(lines), *lines]), err=True)
        sys.exit(1)


class _Age(click.ParamType[float]):
    """`90`, `15m`, `36h` or `44d`, in seconds."""

    name = "age"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds of an age."""
        if isinstance(value, int | float):
            return float(value)
        seconds = age_s(str(value))
        if seconds is None or seconds > _AGE_S_MAX:
            self.fail(f"{value!r} is no age: say 90s, 15m, 36h or 44d", param, ctx)
        return seconds


class _Subscriber(click.ParamType[str]):
    """A number as the ledger has it: E.164 with its plus, or a pseudonym."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The number without what people write between the digits."""
        text = re.sub(r"[\s().-]", "", str(value))
        if not _SUBSCRIBER.fullmatch(text):
            self.fail("a number begins with + and its country's code", param, ctx)
        return text


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_yes = click.option("--yes", is_flag=True, help="Don't ask.")
_unmasked = click.option("--unmasked", is_flag=True, help="Show whole numbers.")
_reason = click.option("--reason", required=True, help="Why; it stays in the ledger.")


def _version() -> str:
    """The installed package's; the image has the code without one."""
    try:
        return version("topup-function")
    except PackageNotFoundError:
        return "of this image: see its label org.opencontainers.image.version"


@click.group(cls=_Commands)
@click.version_option(_version())
def main() -> None:
    """Operate the top-up function."""


main.add_command(doctor)
main.add_command(plan)


@main.command()
def migrate() -> None:
    """Bring the ledger's schema up to date; safe to run twice and at once.

    Also writes what binds people's decisions, RECHARGE_API_SETTLE_S and
    RESOLVE_SECOND_PERSON_ABOVE_MINOR, where it runs with the deployment's settings
    (RECHARGE_API_URL is there); run it again when they change. Then it notes, too, of
    which recharge API the open orders are that an earlier revision sent.
    """
    settings = Settings.ledger_only()
    # By the ledger's settings alone nobody says what binds people.
    rules = rules_of(settings) if settings.recharge_api_url else None
    engine = make_engine(settings)
    revision = run_migrations(engine, rules)
    click.echo(f"ledger at revision {revision}")
    if rules is not None:
        click.echo(
            f"decisions: settling time {rules.settle_s:g} s, "
            f"two persons above {rules.second_person_above_minor}"
        )
        api = load_profile(settings).identity
        if noted := note_api(engine, api):
            click.echo(f"noted that {noted} open orders were sent to {api}")


@main.command()
@click.option("--database", required=True, help="The ledger's database.")
@click.option("--migrate", "migrate_", multiple=True, help="An account's name.")
@click.option("--function", "function_", multiple=True, help="An account's name.")
@click.option("--resolver", "resolver_", multiple=True, help="An account's name.")
@click.option("--operator", multiple=True, help="One person's account; repeatable.")
@click.option("--purge", "purge_", multiple=True, help="An account's name.")
def grants(
    *,
    database: str,
    migrate_: tuple[str, ...],
    function_: tuple[str, ...],
    resolver_: tuple[str, ...],
    operator: tuple[str, ...],
    purge_: tuple[str, ...],
) -> None:
    """Print the SQL that gives each role its rights and no more."""
    accounts = {
        "migrate": migrate_,
        "function": function_,
        "resolver": resolver_,
        "operator": operator,
        "purge": purge_,
    }
    click.echo(script(database, accounts), nl=False)


# -- Look ---------------------------------------------------------------------------


@main.group()
def ledger() -> None:
    """Look at the orders; changes nothing."""


@ledger.command("list")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([status.value for status in Status]),
    help="Only these; repeatable.",
)
@click.option(
    "--subscriber", type=_Subscriber(), help="A number in E.164; its orders in line."
)
@click.option("--channel", help="As the orders name it.")
@click.option("--older-than", type=_Age(), help="Age of the last change of status.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--after", help="What the page before ended with.")
@_unmasked
@_json
def list_(
    *,
    statuses: tuple[str, ...],
    subscriber: str | None,
    channel: str | None,
    older_than: float | None,
    limit: int,
    after: str | None,
    unmasked: bool,
    as_json: bool,
) -> None:
    """List orders, the longest unchanged first."""
    operations = _operations()
    page = operations.list_orders(
        Filters(
            statuses=tuple(Status(status) for status in statuses),
            subscriber=subscriber,
            channel=None if channel is None else quote(channel, safe=""),
            older_than_s=older_than,
            limit=limit,
            after=after,
        )
    )
    orders = [_shown(row, unmasked=unmasked) for row in page.orders]
    if as_json:
        pauses = [asdict(each) for each in operations.pauses()]
        _print_json({"orders": orders, "after": page.after, "paused": pauses})
        return
    _print_table(orders, _LISTED)
    _tell_pauses(operations)
    if page.after:
        click.echo(f"more: --after '{page.after}'")


@ledger.command()
@click.argument("key")
@_unmasked
@_json
def show(*, key: str, unmasked: bool, as_json: bool) -> None:
    """Show everything about one order, and what stands before it."""
    operations = _operations()
    story = operations.show(key)
    order = None if story.order is None else _shown(story.order, unmasked=unmasked)
    parts = {
        "attempts": [asdict(each) for each in story.attempts],
        "decisions": [asdict(each) for each in story.decisions],
        "quarantined": [asdict(each) for each in story.quarantined],
        "before": [_shown(each, unmasked=unmasked) for each in story.before],
    }
    if as_json:
        pauses = [asdict(each) for each in operations.pauses()]
        _print_json({"order": order, **parts, "paused": pauses})
        return
    if order is not None:
        width = max(map(len, order))
        for name, value in order.items():
            if value not in {None, ""} and name not in _SHOWN_OTHERWISE:
                click.echo(f"{name:<{width}}  {_cell(value)}")
    for name, rows in parts.items():
        is_line = name == "before"
        title = "stands before it" if is_line else name
        _print_part(title, rows, _LISTED if is_line else ())
    _tell_pauses(operations)


@ledger.command()
@_unmasked
@_json
def stats(*, unmasked: bool, as_json: bool) -> None:
    """Count orders by status; who is held, what is in quarantine, what is paused."""
    found = _operations().stats()
    shown = asdict(found)
    for row in shown["held"]:
        row["name"] = _number(row["name"], unmasked=unmasked)
    if as_json:
        _print_json(shown)
        return
    for row in shown["apis"]:
        row["name"] = row["name"] or "not known"
    for title in ("statuses", "held", "apis", "quarantine"):
        rows = shown[title]
        for row in rows:
            row["oldest"] = _age(row.pop("oldest_age_s"))
        if title == "statuses":
            _print_table(rows)
        else:
            _print_part(title, rows)
    _print_part("paused", shown["pauses"])


# -- Decide -------------------------------------------------------------------------


@main.command()
@click.argument("key")
@click.option("--executed", "verdict", flag_value="executed", help="It was executed.")
@click.option(
    "--not-executed", "verdict", flag_value="not_executed", help="Call it again."
)
@click.option("--abandon", "verdict", flag_value="abandon", help="Never call it again.")
@click.option("--reference", help="The API's own, with --executed.")
@_reason
@click.option("--name", "note", default="", help="A note; it proves nothing.")
@click.option("--attempt", help="The attempt that you looked at, or its beginning.")
@_yes
@_json
def resolve(
    *,
    key: str,
    verdict: str | None,
    reference: str | None,
    reason: str,
    note: str,
    attempt: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Decide what became of an order in doubt; signed with your database account."""
    if verdict is None:
        raise click.UsageError("say --executed, --not-executed or --abandon")
    operations = _operations()
    if not yes:
        order = operations.show(key).order
        if order is not None:
            _print_table([_shown(order, unmasked=False)], _LISTED, err=True)
            # What is confirmed is what was shown.
            attempt = attempt or order.token or None
        click.confirm(f"Decide {verdict}?", abort=True, err=True)
    decided = operations.decide(
        key,
        Verdict(verdict),
        reason=reason,
        reference=reference,
        note=note,
        attempt_token=attempt,
    )
    if as_json:
        _print_json(asdict(decided))
    elif decided.is_carried_out:
        click.echo(
            f"{key}: {decided.from_status} -> {decided.to_status}, "
            f"decided by {decided.decided_by}"
        )
    else:
        click.echo(
            f"{key}: proposed by {decided.decided_by}; still {decided.from_status}: "
            "above RESOLVE_SECOND_PERSON_ABOVE_MINOR, a second person must decide the "
            "same"
        )


@main.command()
@click.argument("subscriber", type=_Subscriber())
@_yes
@_json
def release(*, subscriber: str, yes: bool, as_json: bool) -> None:
    """Run what is held of a subscriber now, in order; needs the resolver's settings."""
    # Only here: the rest of the commands needs no recharge API.
    from function.resolver import make_resolver  # noqa: PLC0415

    settings = Settings.from_env()
    if not yes:
        click.confirm("Call what is held of this subscriber?", abort=True, err=True)
    resolver_ = make_resolver(settings)
    released = Operations(make_engine(settings)).release(subscriber, resolver_.drain)
    if as_json:
        line = [_shown(each, unmasked=False) for each in released.line]
        _print_json({"line": line, "drained": released.drained})
        return
    _print_table([_shown(each, unmasked=False) for each in released.line], _LISTED)
    click.echo(f"{released.drained} of {len(released.line)} run")


@main.group()
def resolver() -> None:
    """Settle doubt and drain what is held, as a process of its own."""


@resolver.command()
def run() -> None:
    """Go on until SIGTERM; any number may run."""
    from function.resolver import make_resolver  # noqa: PLC0415

    settings = Settings.from_env()
    telemetry.configure(settings.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    make_resolver(settings, stop.is_set).run(stop, settings.resolver_interval_s)


@resolver.command("run-once")
@_json
def run_once(*, as_json: bool) -> None:
    """Make one round and say what it did."""
    from function.resolver import make_resolver  # noqa: PLC0415

    settings = Settings.from_env()
    telemetry.configure(settings.log_level)
    counts = dict(make_resolver(settings).run_once())
    if as_json:
        _print_json(counts)
        return
    _print_table([{"what": name, "count": n} for name, n in counts.items()])


# -- Pause --------------------------------------------------------------------------


def _scope(*, everything: bool, channel: str | None) -> str:
    if everything == (channel is not None):
        raise click.UsageError("say --all, or --channel NAME")
    return EVERYTHING if channel is None else quote(channel, safe="")


_all = click.option("--all", "everything", is_flag=True, help="Every channel.")
_channel = click.option("--channel", help="One channel, as the orders name it.")


@main.command()
@_all
@_channel
@_reason
def pause(*, everything: bool, channel: str | None, reason: str) -> None:
    """Stop new calls on all pods at once; nothing is lost. Doesn't ask."""
    scope = _scope(everything=everything, channel=channel)
    paused = _operations().pause(scope, reason)
    click.echo(f"{scope} paused by {paused.paused_by}: {paused.reason}")


@main.command()
@_all
@_channel
@_reason
@_yes
def resume(*, everything: bool, channel: str | None, reason: str, yes: bool) -> None:
    """Let calls begin again."""
    scope = _scope(everything=everything, channel=channel)
    if not yes:
        click.confirm(f"Resume {scope}?", abort=True, err=True)
    _operations().resume(scope, reason)
    click.echo(f"{scope} resumed")


# -- Purge and forget ---------------------------------------------------------------


@main.command()
@click.option("--older-than", type=_Age(), required=True, help="Such as 44d.")
@click.option(
    "--payloads", is_flag=True, help="Only empty the payloads of settled orders."
)
@click.option("--batch", type=click.IntRange(1, 10_000), default=1000)
@click.option("--dry-run", is_flag=True, help="Only count.")
@_yes
@_json
def purge(
    *,
    older_than: float,
    payloads: bool,
    batch: int,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete settled orders that no record can come again for."""
    settings = Settings.ledger_only()
    retention = Retention(make_engine(settings))
    if not (yes or dry_run):
        what = "Empty payloads" if payloads else "Delete settled orders"
        click.confirm(f"{what} for good?", abort=True, err=True)
    if payloads:
        count = retention.blank_payloads(older_than, batch=batch, is_dry_run=dry_run)
        rows = [{"what": "payloads", "count": count}]
    else:
        purged = retention.purge(
            older_than, Horizon.of(settings), batch=batch, is_dry_run=dry_run
        )
        rows = [{"what": name, "count": n} for name, n in purged.orders.items()]
        rows += [
            {"what": "attempts", "count": purged.attempts},
            {"what": "quarantine", "count": purged.quarantined},
        ]
    if as_json:
        _print_json({str(row["what"]): row["count"] for row in rows})
        return
    _print_table(rows)
    if dry_run:
        click.echo("nothing was changed")


@main.command()
@click.argument("subscriber")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="32 random bytes, for these requests alone; destroy it afterwards.",
)
@_yes
@_json
def forget(*, subscriber: str, key_file: Path, yes: bool, as_json: bool) -> None:
    """Replace a subscriber's number by a keyed hash; `-` reads it from stdin.

    The rows stay recognised by their keys. While the key file exists its owner can
    tell whose they were; a later order of the number is not linked to them once it is
    destroyed.
    """
    if subscriber == "-":
        subscriber = sys.stdin.readline().strip()
        if not yes:
            raise click.UsageError("a number from stdin needs --yes")
    if not yes:
        click.confirm("Replace this number for good?", abort=True, err=True)
    forgotten = Retention(_engine()).forget(subscriber, key_file)
    if as_json:
        _print_json(asdict(forgotten))
        return
    click.echo(
        f"{forgotten.orders} orders are now {forgotten.pseudonym}; "
        f"{forgotten.quarantined} rows of quarantine emptied"
        if forgotten.orders or forgotten.quarantined
        else "nothing of this subscriber is in the ledger"
    )


# -- Reconcile ----------------------------------------------------------------------


def _mapping(
    _ctx: click.Context, _param: click.Parameter, text: str | None
) -> Mapping[str, str]:
    if text is None:
        return COLUMNS
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not (name and equals and column) for name, equals, column in pairs):
        raise click.BadParameter("say key=HEADER,amount=HEADER,…")
    mapping = {name.strip(): column.strip() for name, _, column in pairs}
    if set(mapping) - set(COLUMNS):
        raise click.BadParameter(f"only {', '.join(COLUMNS)} can be mapped")
    return mapping


def _aware(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


@main.command()
@click.argument("statement", type=click.Path(path_type=Path))
@click.option("--columns", callback=_mapping, help="key=HEADER,amount=HEADER,…")
@click.option(
    "--amounts",
    type=click.Choice(["minor", "major"]),
    default="minor",
    show_default=True,
    help="500, or 5.00.",
)
@click.option("--delimiter", default=",", show_default=True)
@click.option("--decimal", default=".", show_default=True)
@click.option(
    "--executed",
    multiple=True,
    default=EXECUTED,
    help="What the status column says of an executed line; repeatable.",
)
@click.option("--from", "begin", type=click.DateTime(), help="Period, UTC, from.")
@click.option("--to", "end", type=click.DateTime(), help="Period, UTC, until before.")
@_json
def reconcile(
    *,
    statement: Path,
    columns: Mapping[str, str],
    amounts: str,
    delimiter: str,
    decimal: str,
    executed: tuple[str, ...],
    begin: datetime | None,
    end: datetime | None,
    as_json: bool,
) -> None:
    """Compare the API operator's statement, a CSV file, with the ledger.

    Its header names key, amount, currency and, if it has them, executed_at (ISO 8601,
    UTC unless it says otherwise), reference and status. --json prints one object a
    line: each difference, then the summary.
    """
    if len(delimiter) != 1:
        raise click.UsageError("--delimiter is one character")
    format_ = Format(
        columns=columns,
        is_major=amounts == "major",
        delimiter=delimiter,
        decimal=decimal,
        executed=tuple(word.lower() for word in executed),
        begin=_aware(begin),
        end=_aware(end),
    )
    summary = Summary()
    try:
        engine = make_engine(Settings.ledger_only())
        for difference in compare(engine, statement, format_, summary):
            if as_json:
                _print_json(asdict(difference), indent=None)
                continue
            click.echo(f"{difference.kind}  {_printable(difference.key)}")
            click.echo(f"  there: {_printable(difference.there)}")
            click.echo(f"  here:  {difference.here}")
            if difference.todo:
                click.echo(f"  run:   {difference.todo}")
    except TopupError as error:
        click.echo(f"topup: not compared: {error}", err=True)
        sys.exit(2)
    if as_json:
        _print_json({"summary": asdict(summary)}, indent=None)
    else:
        rows = [{"what": "matched", "count": summary.matched}]
        rows += [{"what": name, "count": n} for name, n in summary.differences.items()]
        rows += [
            {"what": "not executed there", "count": summary.not_executed},
            {"what": "not judged (edge of the period)", "count": summary.not_judged},
        ]
        _print_table(rows)
    sys.exit(0 if summary.is_clean else 1)


# -- Replay -------------------------------------------------------------------------


@main.command()
@click.option("--to", "url", required=True, help="The function's address.")
@click.option("--file", type=click.Path(path_type=Path), help="Of a dead letter sink.")
@click.option("--from-topic", "topic", help="A dead letter topic; read to its end.")
@click.option(
    "--kafka-config",
    type=click.Path(path_type=Path),
    help="librdkafka properties, name=value a line.",
)
@click.option(
    "--spool",
    type=click.Path(path_type=Path),
    help="Where the topic's letters are kept as a file.",
)
@click.option("--quarantine", is_flag=True, help="From the ledger's quarantine.")
@click.option("--key", help="Of quarantine, only this key.")
@click.option(
    "--outcome",
    type=click.Choice(["malformed", "invalid", "key_reused"]),
    help="Of quarantine, only these.",
)
@click.option("--topic", "of_topic", help="Of quarantine, only this topic.")
@click.option("--partition", type=int, help="Of quarantine, only this partition.")
@click.option("--offset", type=int, help="Of quarantine, only this offset.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Bearer token.",
)
@click.option(
    "--ca-file", type=click.Path(path_type=Path, exists=True), help="The door's CA."
)
@click.option("--continue", "goes_on", is_flag=True, help="Don't stop at a 5xx.")
@_yes
@_json
def replay(
    *,
    url: str,
    file: Path | None,
    topic: str | None,
    kafka_config: Path | None,
    spool: Path | None,
    quarantine: bool,
    key: str | None,
    outcome: str | None,
    of_topic: str | None,
    partition: int | None,
    offset: int | None,
    token_file: Path | None,
    ca_file: Path | None,
    goes_on: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Post dead letters or quarantine through the front door again, in order.

    The ledger decides again: what is settled is a repetition.
    """
    if [file is not None, topic is not None, quarantine].count(True) != 1:
        raise click.UsageError("say one of --file, --from-topic and --quarantine")
    if (topic is None) != (kafka_config is None) or (topic is None) != (spool is None):
        raise click.UsageError("--from-topic, --kafka-config and --spool go together")
    report = Report()
    if quarantine:
        settings = Settings.ledger_only()
        selection = Selection(
            key=key,
            outcome=outcome,
            topic=of_topic,
            partition=partition,
            offset=offset,
        )
        engine = make_engine(settings)
        letters = from_quarantine(engine, selection, settings.event_type, report)
    else:
        if topic is not None and kafka_config is not None and spool is not None:
            count = spool_topic(read_properties(kafka_config), topic, spool)
            click.echo(f"{count} letters kept in {spool}", err=True)
            file = spool
        letters = from_file(file or Path())
    if not yes:
        click.confirm(f"Post to {url}?", abort=True, err=True)
    token = None if token_file is None else _token_of(token_file)
    if urlsplit(url).scheme not in {"http", "https"}:
        raise click.UsageError("--to: an address begins with http:// or https://")
    on_answer = None if as_json else _tell
    post(
        letters,
        url,
        report,
        goes_on=goes_on,
        token=token,
        ca=ca_file,
        on_answer=on_answer,
    )
    if as_json:
        _print_json(asdict(report))
    else:
        rows = [{"outcome": name, "count": n} for name, n in report.outcomes.items()]
        _print_table([*rows, {"outcome": "skipped", "count": report.skipped}])
    if report.stopped_at:
        click.echo(f"topup: stopped at {report.stopped_at}", err=True)
    if report.failed:
        sys.exit(1)


def _token_of(path: Path) -> str:
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token or len(token.split()) != 1:
        raise click.UsageError(f"--token-file: no token in {path}")
    return token


def _tell(letter: Letter, status: int, outcome: str) -> None:
    click.echo(f"{letter.origin}: {status or '-'} {_printable(outcome)}")


# -- Parts --------------------------------------------------------------------------

#: A person reads `amount` and `age`; a program these.
_SHOWN_OTHERWISE: Final = frozenset({"amount_minor", "currency", "age_s"})
_LISTED: Final = (
    "idempotency_key",
    "status",
    "subscriber",
    "amount",
    "age",
    "attempts",
    "reason",
    "reference",
)


def _engine() -> Engine:
    return make_engine(Settings.ledger_only())


def _operations() -> Operations:
    return Operations(_engine())


def _tell_pauses(operations: Operations) -> None:
    """Whoever wonders why nothing moves must not have to ask for it."""
    _print_part("paused", [asdict(each) for each in operations.pauses()])


def _number(msisdn: str, *, unmasked: bool) -> str:
    # A pseudonym is nobody's number.
    is_shown = unmasked or msisdn.startswith("~")
    return msisdn if is_shown else telemetry.mask(msisdn)


def _shown(row: OrderRow, *, unmasked: bool) -> dict[str, object]:
    """An order as it is printed: numbers masked, amount and age readable."""
    shown = asdict(row)
    shown["subscriber"] = _number(shown.pop("msisdn"), unmasked=unmasked)
    shown["amount"] = f"{row.amount_minor} {row.currency}"
    shown["age"] = _age(row.age_s)
    return shown


def _age(seconds: float) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= 2 * UNIT_S[unit]:
            return f"{seconds / UNIT_S[unit]:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, float):
        return _age(value)
    if isinstance(value, Enum):
        value = value.value
    text = "" if value is None else str(value)
    return _printable(text)


def _printable(text: str) -> str:
    """Foreign words must not move a person's cursor, nor be no text at all."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _print_part(
    title: str, rows: Iterable[Mapping[str, object]], columns: Sequence[str] = ()
) -> None:
    found = list(rows)
    if found:
        click.echo(f"\n{title}")
        _print_table(found, columns)


def _print_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] = (),
    *,
    err: bool = False,
) -> None:
    """Plain aligned columns; a column that is empty in every row is left out."""
    if not rows:
        click.echo("none", err=err)
        return
    names = columns or tuple(rows[0])
    table = {name: [_cell(row[name]) for row in rows] for name in names}
    table = {name: cells for name, cells in table.items() if any(cells)}
    widths = {name: max(len(name), *map(len, table[name])) for name in table}
    for line in _table_lines(table, widths):
        click.echo(line.rstrip(), err=err)


def _table_lines(
    table: Mapping[str, Sequence[str]], widths: Mapping[str, int]
) -> Iterator[str]:
    yield "  ".join(name.ljust(widths[name]) for name in table)
    for cells in zip(*table.values(), strict=True):
        yield "  ".join(
            cell.ljust(widths[name]) for name, cell in zip(table, cells, strict=True)
        )


def _print_json(value: object, *, indent: int | None = 2) -> None:
    click.echo(json.dumps(value, default=_jsonable, indent=indent))


def _jsonable(value: object) -> object:
    if isinstance(value, datetime):
        # The ledger's moments are UTC and say so nowhere.
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return moment.isoformat()
    return str(value)


if __name__ == "__main__":
    main()
