"""The whole story: every scene, then the verdict.

Owns the order of the scenes, the folder of traces, the report and the exit status; must
never soften the verdict: it is the judge's, and the judge reads the API's book.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

from demo import grounds, scenes
from demo.account import Account
from demo.judge import Verdict, judge
from demo.rebalance import rebalance
from demo.server_process import PROJECT
from demo.stage import Stage
from demo.subject import Function, Naive, Subject
from demo.traces import emptied, shown

Services = Literal["embedded", "real"]
Scene = Callable[[Stage, Account], scenes.Facts]

#: So many offending keys are named; all of them are in the report.
_KEYS_SHOWN_MAX: Final = 4


def directory_of(env: Mapping[str, str]) -> Path:
    """Where the traces go: build/demo, unless DEMO_DIRECTORY names another folder."""
    return Path(env.get("DEMO_DIRECTORY") or PROJECT / "build" / "demo").absolute()


def play(*, services: Services, is_naive: bool) -> int:
    """Play it, tell it and judge it; returns the exit status.

    Raises:
        ServiceMissing: a program or a server is not there.
        ServerError: a server does not start.
        PartFailed: a part does not do its part; names the log to read.

    """
    account = Account()
    directory = directory_of(os.environ)
    began_s = time.monotonic()
    told: dict[str, object] = {}
    with ExitStack() as stack:
        stack.enter_context(emptied(directory, "demo"))
        logging.basicConfig(filename=directory / "demo.log", level=logging.INFO)
        subject, stage = _set(stack, directory, services, is_naive=is_naive)
        _prologue(account, stage)
        stage.play("replay")
        stage.start_source()
        for scene in _scenes(services):
            scene_began_s = time.monotonic()
            facts = scene(stage, account)
            seconds = round(time.monotonic() - scene_began_s, 1)
            told[scene.__name__] = {"seconds": seconds, **facts}
        stage.stop_source()
        sent = stage.records.all()
        verdict = judge(
            sent,
            stage.book(),
            stage.ledger(),
            names=subject.names(sent),
            delivered=stage.delivered(),
            seconds=time.monotonic() - began_s,
        )
    report = {
        "naive": is_naive,
        "services": services,
        "green": verdict.is_green,
        **verdict.as_json(),
        "scenes": told,
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _epilogue(account, verdict, directory, is_naive=is_naive)
    return 0 if verdict.is_green else 1


def _set(
    stack: ExitStack, directory: Path, services: Services, *, is_naive: bool
) -> tuple[Subject, Stage]:
    """Build the stage for whoever is on trial."""
    build = grounds.real if services == "real" else grounds.embedded
    ground = build(stack, directory)
    subject: Subject = Naive(ground.database) if is_naive else Function(ground.database)
    return subject, stack.enter_context(Stage(directory, ground, subject))


def _scenes(services: Services) -> list[Scene]:
    played: list[Scene] = [
        scenes.many_apps,
        scenes.shut_down_unexpectedly,
        scenes.a_doubt_and_a_person,
        scenes.external_server_error,
        scenes.what_nobody_should_send,
    ]
    if services == "real":
        # The mock cluster's consumer groups are not reliable enough.
        played.append(rebalance)
    return played


def _prologue(account: Account, stage: Stage) -> None:
    ground = stage.grounds
    is_naive = stage.subject.is_naive
    account.heading("Top-ups: the naive way" if is_naive else "Top-ups, exactly once")
    who = (
        "the article's own design (demo/naive.py)"
        if is_naive
        else "the function of this project"
    )
    account.say(
        f"Played here: {who} under functions-framework, a sandbox recharge API that "
        "keeps its own book of what it was called for and what it executed, and a "
        "stand-in for Knative's Kafka source, which delivers each record until it is "
        f"answered with success. Broker: {ground.broker}. Ledger: "
        f"{ground.database_name}. Logs: {shown(stage.directory)}"
    )


def _epilogue(
    account: Account, verdict: Verdict, directory: Path, *, is_naive: bool
) -> None:
    account.heading("The verdict")
    account.say(
        "Judged by the book of the recharge API alone; the ledger only shows what is "
        "not forgotten although it was not executed."
    )
    account.table(("", "", ""), _rows(verdict), is_red=_is_wrong)
    for what, keys in (
        ("double", verdict.double_keys),
        ("missing", verdict.missing_keys),
        ("out of order", verdict.out_of_order_keys),
        ("misjudged", verdict.misjudged_keys),
    ):
        if keys:
            more = " ..." if len(keys) > _KEYS_SHOWN_MAX else ""
            account.say(f"{what}: {', '.join(keys[:_KEYS_SHOWN_MAX])}{more}", "red")
    account.say("")
    who = "The naive handler" if is_naive else "The function"
    if verdict.is_green:
        text = (
            f"GREEN: {verdict.executed} recharges, each exactly once and in order. "
            "Nothing is missing."
        )
    else:
        text = (
            f"RED: {who} recharged {verdict.double} times too often, lost sight of "
            f"{verdict.missing} records, and executed {verdict.out_of_order} out of "
            "order."
        )
    account.result(text, is_good=verdict.is_green)
    account.say(
        f"{verdict.seconds:g} s; everything in {shown(directory)}/report.json", "dim"
    )


def _rows(verdict: Verdict) -> list[tuple[str, str, str]]:
    doubt = f"for a person; the API did execute {verdict.in_doubt_executed}"
    numbers = (
        ("sent", verdict.sent, "records, duplicates included"),
        ("unique", verdict.unique, "different orders; each refused record is one"),
        ("executed", verdict.executed, "orders, by the book"),
        ("quarantined", verdict.quarantined, "recorded, never to be executed"),
        ("rejected", verdict.rejected, "refused by the recharge API"),
        ("in doubt", verdict.in_doubt, doubt),
        ("held", verdict.held, "behind one in doubt, in the ledger"),
        ("calls", verdict.calls, "of the recharge API"),
        ("redeliveries", verdict.redeliveries, "of a record that was delivered before"),
        ("dead letters", verdict.dead_lettered, "taken by the dead letter sink"),
        ("double", verdict.double, "executions too many"),
        ("missing", verdict.missing, "neither executed nor to be seen anywhere"),
        ("out of order", verdict.out_of_order, "executed after a later one"),
        ("misjudged", verdict.misjudged, "executed or refused against the rules"),
    )
    return [(name, str(number), meaning) for name, number, meaning in numbers]


def _is_wrong(row: object) -> bool:
    match row:
        case ("double" | "missing" | "out of order" | "misjudged", str(number), _):
            return number != "0"
        case _:
            return False
