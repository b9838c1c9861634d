"""The commands about a cluster: `topup doctor` and `topup plan`.

Owns their words and output; must never judge or compute anything itself.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import click

from function.config import environment
from function.doctor.cluster import Access, read_live, read_offline
from function.doctor.diagnosis import Diagnosis, Severity, exit_status
from function.doctor.documents import NAMESPACE, Documents, parts_of
from function.doctor.examination import examine, examine_services, in_order
from function.durations import age_s, shown
from function.errors import DocumentsUnreadable
from function.plan import COMMIT_INTERVAL_S, Load, Plan, make_plan

_COLOURS: Final = {
    Severity.ERROR: "red",
    Severity.UNKNOWN: "magenta",
    Severity.WARNING: "yellow",
    Severity.OK: "green",
}
#: More than this is a denial, not a plan; it also keeps a number's text short.
_RATE_UNITS_S: Final = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}


class Rate(click.ParamType[float]):
    """`120`, `120/s`, `7200/min`, `1e6/h` or `5e6/d`: orders a second."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The orders a second."""
        count, _, unit = str(value).partition("/")
        try:
            return float(count) / _RATE_UNITS_S[unit]
        except (ValueError, KeyError):
            self.fail(f"{value!r}: say 120/s, 7200/min, 1e6/h or 5e6/d", param, ctx)


class Seconds(click.ParamType[float]):
    """`0.3`, `300ms`, `90s` or `15m`, in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds."""
        found = age_s(str(value))
        if found is None:
            self.fail(f"{value!r}: say 0.3, 300ms, 90s or 15m", param, ctx)
        return found


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.option("--namespace", help="[default: topup, or the rendered KafkaSource's]")
@click.option("--context", help="Of the kubeconfig; its current one when left out.")
@click.option("--kubeconfig", help="Another than kubectl would take.")
@click.option(
    "--offline",
    metavar="PATH",
    help="Rendered manifests instead of a cluster: a folder, a file, or - for stdin.",
)
@click.option(
    "--partitions",
    type=click.IntRange(1),
    help="Of the topic of orders, where no KafkaTopic says it.",
)
@click.option("--strict", is_flag=True, help="A warning is an error.")
@_json
def doctor(
    *,
    namespace: str | None,
    context: str | None,
    kubeconfig: str | None,
    offline: str | None,
    partitions: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Check cluster, database and recharge API against what the design demands.

    Reads only. The database and the API are asked where LEDGER_DATABASE_URL and
    RECHARGE_API_URL are set, with the function's account and credentials.

    Exit status: 0 nothing is wrong, 1 an error, 2 used wrongly or nothing to look at,
    3 no error, but something could not be looked at. With --strict a warning is an
    error.
    """
    if offline is not None and (context or kubeconfig):
        raise click.UsageError("--offline looks at no cluster")
    documents: Documents | None
    found: list[Diagnosis] = []
    try:
        if offline is not None:
            documents = read_offline(offline, namespace)
        else:
            access = Access(namespace or NAMESPACE, context, kubeconfig)
            documents, found = read_live(access)
    except DocumentsUnreadable as error:
        click.echo(f"topup: {error}", err=True)
        sys.exit(2)
    parts = None if documents is None else parts_of(documents, partitions)
    if parts is not None:
        found = [*found, *examine(parts)]
    found += examine_services(environment(), parts, is_live=offline is None)
    status = exit_status(found, is_strict=strict)
    _print_diagnoses(in_order(found), status, as_json=as_json)
    sys.exit(status)


def _print_diagnoses(found: Sequence[Diagnosis], status: int, *, as_json: bool) -> None:
    counts = {
        severity.value: sum(each.severity is severity for each in found)
        for severity in Severity
    }
    if as_json:
        report = {
            "diagnoses": [asdict(each) for each in found],
            "counts": counts,
            "exit_status": status,
        }
        click.echo(json.dumps(report, indent=2))
        return
    for each in found:
        severity = click.style(f"{each.severity:<8}", fg=_COLOURS.get(each.severity))
        todo = f" -> {each.todo}" if each.todo else ""
        click.echo(severity + _plain(f"{each.subject}: {each.message}{todo}"))
    click.echo(", ".join(f"{count} {name}" for name, count in counts.items() if count))


def _plain(text: str) -> str:
    """One line: a controller's words must not move a person's cursor."""
    return "".join(each if each.isprintable() else " " for each in text)


@click.command()
@click.option("--rate", type=Rate(), required=True, help="At the peak: 120/s, 5e6/d.")
@click.option(
    "--api-latency",
    type=Seconds(),
    required=True,
    help="Mean time of one call of the recharge API: 300ms.",
)
@click.option(
    "--overhead",
    type=Seconds(),
    default="20ms",
    show_default=True,
    help="Mean time of the rest: source, HTTP, two round trips to the database.",
)
@click.option(
    "--headroom",
    type=float,
    default=2.0,
    show_default=True,
    help="Capacity over rate: to catch up, and for keys that spread unevenly.",
)
@click.option("--threads", type=int, default=8, show_default=True, help="Of a pod.")
@click.option(
    "--drain-within",
    type=Seconds(),
    default="30s",
    show_default=True,
    help="How long a pod's share of the lag may take.",
)
@click.option("--backlog", type=int, default=0, help="Orders that wait already.")
@click.option("--partitions-now", type=int, help="What the topic has; is it enough?")
@_json
def plan(
    *,
    rate: float,
    api_latency: float,
    overhead: float,
    headroom: float,
    threads: int,
    drain_within: float,
    backlog: int,
    partitions_now: int | None,
    as_json: bool,
) -> None:
    """Compute partitions, pods, threads and connections for a wished rate."""
    load = Load(
        rate=rate,
        api_latency_s=api_latency,
        overhead_s=overhead,
        headroom=headroom,
        threads=threads,
        drain_within_s=drain_within,
        backlog=backlog,
        partitions_now=partitions_now,
    )
    made = make_plan(load)
    if as_json:
        report = {"load": asdict(load), "plan": asdict(made)}
        click.echo(json.dumps(report, indent=2))
        return
    for name, value, why in _plan_rows(load, made):
        click.echo(f"{name:<26} {value:>10}  {why}")
    for line in _ASSUMPTIONS:
        click.echo(line)


def _plan_rows(load: Load, made: Plan) -> list[tuple[str, str, str]]:
    used = load.partitions_now or made.partitions
    rows = [
        ("an order takes", shown(load.service_s), "API and overhead; one a partition"),
        ("partitions, at least", f"{made.partitions_min}", "rate x time"),
        (
            "partitions",
            f"{made.partitions}",
            f"x headroom {load.headroom:g}, rounded up; can't be changed later",
        ),
        ("capacity", f"{made.capacity:.4g}/s", "partitions / time"),
        (
            "one subscriber",
            f"{made.subscriber_rate_max:.3g}/s",
            "at most, whatever is scaled: the order is the point",
        ),
    ]
    if made.capacity_now is not None:
        verdict = "enough" if made.is_enough_now else "not enough with this headroom"
        rows.append(
            (
                f"capacity of {load.partitions_now} now",
                f"{made.capacity_now:.4g}/s",
                f"{verdict}; more partitions are a new topic, see RUNBOOK",
            )
        )
    rows += [
        ("pods, at least", f"{made.pods}", f"of {load.threads} threads; min-scale"),
        (
            "pods, at most",
            f"{made.pods_max}",
            f"threads for {used} partitions; max-scale",
        ),
        (
            "database connections",
            f"{made.connections}",
            "threads x pods x 2, while one revision replaces another",
        ),
        ("KEDA maxReplicaCount", f"{used}", "of the KafkaSource: the partitions"),
        (
            "KEDA maxReplicaCount",
            f"{made.pods_max}",
            "of the function's Deployment, where there is no Serving",
        ),
        (
            "KEDA lagThreshold",
            f"{made.lag_threshold}",
            f"what a pod works off in {shown(load.drain_within_s)}",
        ),
        (
            "lag at rest",
            f"{made.lag_at_rest}",
            f"done, but committed only every {COMMIT_INTERVAL_S:g} s",
        ),
        (
            "an hour's outage",
            _until(made.outage_hour_drained_s),
            "until it is worked off, while orders go on to come",
        ),
    ]
    if load.backlog:
        rows.append(("backlog", _until(made.backlog_drained_s), "until it is gone"))
    return rows


def _until(seconds: float | None) -> str:
    return "never" if seconds is None else shown(seconds)


_ASSUMPTIONS: Final = (
    "",
    "Assumed: ordered delivery, so one order of a partition at a time; keys that",
    "spread evenly, or a headroom that covers that they don't; mean times, the API's",
    "under this very load. Measure --api-latency and --overhead where it will run.",
    "Consumers of the KafkaSource add no capacity; partitions do.",
)
