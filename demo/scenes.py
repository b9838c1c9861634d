"""The scenes of the story, each told while it happens.

Owns what is sent, what is broken and when; must never judge: every number that it tells
was read from the recharge API's book, the ledger or the source's journal.
"""

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from demo.account import Account
from demo.faults import Fault, Script
from demo.judge import Sent
from demo.producers import App, Order, Shape, subscriber
from demo.stage import TIMEOUT_S, Stage

#: What a scene found, for report.json.
Facts = dict[str, object]

SUBSCRIBERS: Final = 24
ORDERS_OF_AN_APP: Final = 54
#: Every eighth order is written twice, at once or a few orders later.
_DUPLICATE_EVERY: Final = 8
_SEED: Final = 20
APPS: Final[tuple[tuple[str, Shape], ...]] = (
    ("app", "binary"),
    ("shop", "structured"),
    ("server", "plain"),
    ("web", "binary"),
)

KINDS: Final = {
    "replay": "answers a repeated key with the first result, and executes nothing",
    "refuse": "refuses a repeated key, and can be asked what became of it",
    "lookup": "can be asked about a key, but would execute a repetition",
    "none": "executes a repetition, and can't be asked",
}

_ORDERS_OF_STUCK: Final = 4
_OTHERS: Final = 24
_OTHER_SUBSCRIBERS: Final = 12

_OUTAGE_ORDERS: Final = 36
_OUTAGE_SUBSCRIBERS: Final = 12
#: Of the source's requests that must have failed before the API fails otherwise.
_ATTEMPTS_A_PHASE: Final = 6
_PHASE_TIMEOUT_S: Final = 12.0
#: Longer than any of the scene; it is ended when the scene says so.
_FOR_LONG_S: Final = 120.0
_HUGE_BYTES: Final = 10 * 1024 * 1024


def many_apps(stage: Stage, account: Account) -> Facts:
    """Scene 1: many producers, three shapes of records, duplicates."""
    account.heading("1  Many apps, one topic")
    apps = [stage.app(channel, shape) for channel, shape in APPS]
    in_parallel([_writer(app, seed) for seed, app in enumerate(apps)])
    records = stage.records.all()
    orders = len({record.key for record in records})
    shapes = [record.kind for record in records]
    account.say(
        f"{len(apps)} apps wrote {orders} top-ups of {SUBSCRIBERS} subscribers: "
        f"{shapes.count('binary')} records as CloudEvents in binary mode, "
        f"{shapes.count('structured')} in structured mode, {shapes.count('plain')} as "
        f"plain JSON. {len(records) - orders} are duplicates: the same order again, "
        "at another offset."
    )
    _consume(stage, account, len(records))
    executed = sum(entry.entry == "executed" for entry in stage.book())
    account.say(
        f"All {len(records)} records are consumed. The book of the recharge API has "
        f"{executed} recharges."
    )
    return {"records": len(records), "orders": orders, "executed": executed}


def _writer(app: App, seed: int) -> Callable[[], None]:
    def write() -> None:
        chance = random.Random(_SEED + seed)
        late: list[Order] = []
        for number in range(ORDERS_OF_AN_APP):
            order = Order(
                f"{number:03d}",
                app.channel,
                # Each app serves every subscriber, in an order of its own.
                subscriber((number * 5 + seed * 7) % SUBSCRIBERS),
                amount_minor=chance.choice((500, 1000, 2000)),
            )
            app.send(order)
            if number % _DUPLICATE_EVERY == 0:
                late.append(order)
            elif late and chance.random() < 1 / 2:
                app.send(late.pop())
        for order in late:
            app.send(order)
        app.flush()

    return write


def in_parallel(works: list[Callable[[], None]]) -> None:
    """Run all at once, and raise what the first of them has raised."""
    failures: list[Exception] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 # raised below, in the main thread.
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _consume(stage: Stage, account: Account, records: int, what: str = "") -> None:
    """Wait until all is consumed, with a bar."""

    def done() -> int:
        return max(0, records - stage.waiting())

    account.progress(what or "delivering", records, done, TIMEOUT_S)
    stage.wait_until_consumed()


# -- shutDownUnexpectedly ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """What ledger and book say at one moment."""

    what: str
    ledger: str
    calls: int
    executions: int
    look_ups: int


def shut_down_unexpectedly(stage: Stage, account: Account) -> Facts:
    """Scene 2: SIGKILL after the execution, and after the settlement, for each kind."""
    account.heading("2  shutDownUnexpectedly")
    account.say(
        "The function's whole process group is killed with SIGKILL in the middle of a "
        "top-up, and started again, as Kubernetes would. Its record was not "
        "acknowledged, so it is delivered again. What can be done about it depends on "
        "the recharge API."
    )
    facts: Facts = {}
    for number, kind in enumerate(KINDS):
        stage.play(kind)
        account.say("")
        account.say(f"An API of kind {kind}: it {KINDS[kind]}.", style="bold")
        app = stage.app(f"kill-{kind}", "binary")
        first, second = subscriber(100 + 2 * number), subscriber(101 + 2 * number)
        steps = _kill_after_execution(stage, account, app, first)
        steps += _kill_after_settlement(stage, account, app, second)
        account.table(
            ("", "ledger says", "calls", "executions", "look-ups"),
            [
                (s.what, s.ledger, str(s.calls), str(s.executions), str(s.look_ups))
                for s in steps
            ],
            is_red=lambda row: int(row[3]) > 1,
        )
        account.say(_conclusion(steps[1]))
        facts[kind] = [
            {name: getattr(step, name) for name in step.__slots__} for step in steps
        ]
    return facts


def _kill_after_execution(
    stage: Stage, account: Account, app: App, msisdn: str
) -> list[_Step]:
    """Kill it when the credit has moved and only the API knows."""
    stage.api.misbehave(
        Script(Fault.EXECUTE_THEN_KILL, msisdn=msisdn, pgid=stage.function.group_id)
    )
    victim = _send(stage, app, Order("executed-then-killed", app.channel, msisdn))
    stage.function.wait_until_dead(TIMEOUT_S)
    steps = [_step(stage, "killed after the API executed", victim)]
    follower = _send(stage, app, Order("after-the-killed", app.channel, msisdn))
    stage.function.restart()
    _consume(stage, account, 2, "until the killed attempt's lease is over")
    steps.append(_step(stage, "  delivered again", victim))
    steps.append(_step(stage, "  the subscriber's next top-up", follower))
    return steps


def _kill_after_settlement(
    stage: Stage, account: Account, app: App, msisdn: str
) -> list[_Step]:
    """Kill it when the ledger is settled and the source has no answer yet."""
    stage.crash_before_answer()
    victim = _send(stage, app, Order("settled-then-killed", app.channel, msisdn))
    stage.function.wait_until_dead(TIMEOUT_S)
    steps = [_step(stage, "killed after the ledger was settled", victim)]
    stage.function.restart()
    _consume(stage, account, 1)
    steps.append(_step(stage, "  delivered again", victim))
    return steps


def _send(stage: Stage, app: App, order: Order) -> Sent:
    """Write one order and say where it stands."""
    app.send(order)
    app.flush()
    return next(each for each in stage.records.all() if each.key == order.key)


def _step(stage: Stage, what: str, sent: Sent) -> _Step:
    return _Step(what, stage.subject.says_of(sent), *stage.counts(sent))


def _conclusion(step: _Step) -> str:
    """What the numbers of a record that was delivered again mean, in words."""
    if step.executions > 1:
        return "The subscriber was recharged twice."
    if step.ledger == "nothing":
        return (
            f"Executed, and its own table knows nothing of it. Called {step.calls} "
            "times in all, and each answer was an error: the source has given up, and "
            "everybody behind this record had to wait for that."
        )
    if step.calls > 1 and step.ledger in {"succeeded", "processed"}:
        return "Called twice with the same key, executed once."
    if step.look_ups and step.ledger == "succeeded":
        return "Found by a look-up and settled; not called to recharge again."
    if step.ledger == "parked":
        return (
            "Not called again, for nobody can find out what became of it: it is "
            "parked, in doubt, for a person to settle. The subscriber's next top-ups "
            "are held behind it, in the ledger; nobody else waits."
        )
    return f"The ledger says: {step.ledger}."


# -- A doubt, and a person -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stuck:
    """One subscriber who is stuck, and what a person will say of the first order."""

    name: str
    msisdn: str
    fault: Fault
    verdict: str
    orders: list[Sent]


def a_doubt_and_a_person(stage: Stage, account: Account) -> Facts:
    """Scene 3: a lost answer that nobody can ask for, and a poisoned subscriber."""
    account.heading("3  A doubt, and a person")
    stage.play("none")
    lost = _Stuck(
        "answer lost", subscriber(150), Fault.EXECUTE_THEN_DROP, "--executed", []
    )
    poisoned = _Stuck(
        "poisoned", subscriber(151), Fault.ERROR_BEFORE, "--not-executed", []
    )
    account.say(
        "The API is still of kind none. For one subscriber it executes and the answer "
        "is lost; for another it answers 500, always. Each has three more top-ups "
        f"coming, and {_OTHERS} top-ups of {_OTHER_SUBSCRIBERS} other subscribers "
        "stand between and behind them, in the same partitions."
    )
    others = _send_doubtful(stage, lost, poisoned)
    _consume(stage, account, _OTHERS + 2 * _ORDERS_OF_STUCK)
    before = [_line_of(stage, stuck) for stuck in (lost, poisoned)]
    before.append(_line_of_others(stage, others))
    columns = ("", "ledger says of the first", "of the next three", "executed")
    account.table(columns, before)
    if stage.subject.is_naive:
        stage.api.recover()
        return {"before": [list(row) for row in before]}
    said = _settle(stage, account, [lost, poisoned])
    after = [_line_of(stage, stuck) for stuck in (lost, poisoned)]
    account.table(columns, after)
    account.say(
        "The resolver ran what was held, in order. What was left of scene 2 is "
        "settled in the same way."
    )
    return {
        "before": [list(row) for row in before],
        "operator": said,
        "after": [list(row) for row in after],
    }


def _send_doubtful(stage: Stage, *stuck: _Stuck) -> list[Sent]:
    """Write the two lines, with the others' orders between them; returns those."""
    app = stage.app("doubt", "binary")
    for each in stuck:
        times = 1 if each.fault is Fault.EXECUTE_THEN_DROP else None
        stage.api.misbehave(
            Script(each.fault, msisdn=each.msisdn, times=times, status=500)
        )
    others: list[Sent] = []
    for number in range(_ORDERS_OF_STUCK):
        for each in stuck:
            name = f"{each.name.replace(' ', '-')}-{number}"
            each.orders.append(_send(stage, app, Order(name, app.channel, each.msisdn)))
        for other in range(_OTHERS // _ORDERS_OF_STUCK):
            msisdn = subscriber(160 + other % _OTHER_SUBSCRIBERS)
            order = Order(f"other-{number}-{other}", app.channel, msisdn)
            others.append(_send(stage, app, order))
    return others


def _line_of(stage: Stage, stuck: _Stuck) -> tuple[str, str, str, str]:
    first, *rest = [stage.subject.says_of(each) for each in stuck.orders]
    executed = sum(stage.counts(each)[1] for each in stuck.orders)
    return (stuck.name, first, ", ".join(rest), f"{executed} of {_ORDERS_OF_STUCK}")


def _line_of_others(stage: Stage, others: list[Sent]) -> tuple[str, str, str, str]:
    names = stage.subject.names(others)
    executed = {e.key for e in stage.book() if e.entry == "executed"} & set(names)
    return ("all others", "-", "-", f"{len(executed)} of {len(others)}")


def _settle(stage: Stage, account: Account, stuck: list[_Stuck]) -> list[str]:
    """Let a person look into the API's book, and tell the ledger what is in it."""
    references = {e.key: e.reference for e in stage.book() if e.entry == "executed"}
    stage.api.recover()
    account.say("")
    account.say("A person asks the API's operator, and settles them:")
    left_of_scene_2 = [
        each
        for each in stage.records.all()
        if each.expected == "valid" and stage.subject.says_of(each) == "parked"
    ]
    verdicts = {each.orders[0].key: each.verdict for each in stuck}
    said = []
    for key in dict.fromkeys(each.key for each in left_of_scene_2 if each.key):
        verdict = verdicts.get(key, "--executed")
        command = ["resolve", key, verdict, "--reason", "asked their operator"]
        if verdict == "--executed":
            command += ["--reference", references[key] or ""]
        answer = stage.operate([*command, "--yes"])
        if key in verdicts:
            account.say(f"$ topup resolve {key} {verdict} ...", "dim")
            account.say(answer, "dim")
            said.append(answer)
    stage.wait_until(
        lambda: all(
            stage.subject.says_of(each) == "succeeded"
            for line in stuck
            for each in line.orders
        ),
        "run what was held",
    )
    return said


# -- externalServerError -------------------------------------------------------------


def external_server_error(stage: Stage, account: Account) -> Facts:
    """Scene 4: the API fails in every way for a while, then is back."""
    account.heading("4  externalServerError")
    stage.play("replay")
    phases: dict[str, Callable[[], None]] = {
        "answers 500": _misbehaves(stage, Fault.ERROR_BEFORE, status=500),
        "answers 503": _misbehaves(stage, Fault.ERROR_BEFORE, status=503),
        "hangs": _misbehaves(stage, Fault.HANG),
        "refuses connections": lambda: stage.api.refuse_connections(_FOR_LONG_S),
    }
    account.say(
        f"{_OUTAGE_ORDERS} top-ups of {_OUTAGE_SUBSCRIBERS} subscribers arrive while "
        "the recharge API (kind replay) is broken. Each delivery fails, so the "
        "source keeps the record and delivers it again, later and later; what stands "
        "behind it waits."
    )
    if not stage.subject.is_naive:
        account.say(
            "The first that fail are parked or released: were they alone at fault, "
            "all others would go on. After three the circuit breaker opens, and the "
            "others wait untried. The resolver brings back what was parked."
        )
    phases["answers 500"]()
    first, executed = _send_outage_orders(stage), _executions(stage)
    rows = []

    def tell(what: str, attempts: int) -> None:
        numbers = (attempts, _executions(stage) - executed, stage.waiting())
        rows.append((what, *map(str, numbers), stage.subject.says_of(first)))

    for what, begin in phases.items():
        begin()
        tell(what, _wait_for_failures(stage, account, what))
    stage.api.recover()
    attempts = stage.attempts()
    _consume(stage, account, _OUTAGE_ORDERS)
    if not stage.subject.is_naive:
        stage.wait_until(
            lambda: _executions(stage) - executed == _OUTAGE_ORDERS, "taken up the rest"
        )
    tell("is back", stage.attempts() - attempts)
    account.table(
        ("the API", "deliveries", "executed", "waiting", "ledger says of the first"),
        rows,
    )
    return {"phases": [list(row) for row in rows]}


def _send_outage_orders(stage: Stage) -> Sent:
    """Write them all; returns one that nothing stands before."""
    app = stage.app("outage", "plain")
    for number in range(_OUTAGE_ORDERS):
        msisdn = subscriber(200 + number % _OUTAGE_SUBSCRIBERS)
        app.send(Order(f"{number:03d}", app.channel, msisdn))
    app.flush()
    ours = stage.records.all()[-_OUTAGE_ORDERS:]
    return min(ours, key=lambda record: (record.partition, record.offset))


def _misbehaves(stage: Stage, fault: Fault, status: int = 0) -> Callable[[], None]:
    def begin() -> None:
        stage.api.recover()
        stage.api.misbehave(
            Script(fault, times=None, status=status, delay_s=_FOR_LONG_S)
        )

    return begin


def _wait_for_failures(stage: Stage, account: Account, what: str) -> int:
    """Wait until the source has failed often enough; returns how often."""
    before = stage.attempts()

    def failed() -> int:
        return stage.attempts() - before

    account.progress(f"the API {what}", _ATTEMPTS_A_PHASE, failed, _PHASE_TIMEOUT_S)
    return failed()


def _executions(stage: Stage) -> int:
    return sum(entry.entry == "executed" for entry in stage.book())


# -- What nobody should send -----------------------------------------------------------


def what_nobody_should_send(stage: Stage, account: Account) -> Facts:
    """Scene 5: poison, recorded and dead-lettered, while others go on."""
    account.heading("5  What nobody should send")
    stage.play("replay")
    app = stage.app("stranger", "plain")
    poisons: dict[str, Callable[[str], None]] = {
        "malformed JSON": lambda msisdn: app.send_garbage(
            msisdn, b'{"rechargeId": "cut in the mid'
        ),
        "a missing field": _spoiled(app, "missing", amountMinor=None),
        "a negative amount": _spoiled(app, "negative", amountMinor=-500),
        "an unknown currency": _spoiled(app, "currency", currency="XYZ"),
        "a number that is no MSISDN": _spoiled(app, "msisdn", msisdn="0800-CALL-ME"),
        "the same key, another amount": _reused_key(app),
    }
    account.say(
        "Each of these is followed by a good top-up of the same subscriber, which "
        "stands behind it in the same partition."
    )
    pairs = []
    for number, (what, send) in enumerate(poisons.items()):
        msisdn = subscriber(300 + number)
        send(msisdn)
        app.flush()
        poison = [each for each in stage.records.all() if each.msisdn == msisdn][-1]
        good = Order(f"good-{number}", app.channel, msisdn)
        pairs.append((what, poison, _send(stage, app, good)))
    stage.wait_until_consumed()
    rows = [
        (
            what,
            _words(stage.answers(poison)),
            stage.subject.says_of(poison),
            stage.subject.says_of(good),
        )
        for what, poison, good in pairs
    ]
    rows.append(_huge(stage))
    columns = ("", "HTTP answer", "ledger says", "the next top-up")
    account.table(columns, rows, is_red=lambda row: row[2] != "in quarantine")
    account.say(
        f"The dead letter sink has {stage.delivered().dead_lettered} records by now, "
        "with those of scene 2."
    )
    if forwarded := stage.forward_dead_letters():
        account.say(
            f"{forwarded} of them are in the topic {stage.grounds.dead_letter_topic}, "
            "written by the one user who may write there, and nowhere else."
        )
    return {"refused": [list(row) for row in rows]}


def _spoiled(app: App, name: str, **spoiled: object) -> Callable[[str], None]:
    """Send an order with other fields; None leaves the field out."""

    def send(msisdn: str) -> None:
        order = Order(name, app.channel, msisdn)
        data = {**order.data(), **spoiled}
        kept = {name: value for name, value in data.items() if value is not None}
        app.send_data(order, kept, "refused")

    return send


def _reused_key(app: App) -> Callable[[str], None]:
    def send(msisdn: str) -> None:
        order = Order("reused", app.channel, msisdn)
        app.send(order)
        app.send_data(order, {**order.data(), "amountMinor": 99_00}, "refused")

    return send


def _huge(stage: Stage) -> tuple[str, str, str, str]:
    """Post 10 MB directly, twice: no broker lets them through."""
    msisdn = subscriber(350)
    data = Order("huge", "stranger", msisdn).data()
    body = json.dumps({**data, "note": "x" * _HUGE_BYTES}).encode()
    status = stage.post_directly(body, msisdn)
    recorded = stage.subject.says_of(stage.records.all()[-1])
    return ("10 MB, posted directly", _words([status]), recorded, "-")


def _words(statuses: list[int | None]) -> str:
    """The last answer, and how many there were before it."""
    if not statuses:
        return "none"
    last = "no answer" if statuses[-1] is None else str(statuses[-1])
    return last if len(statuses) == 1 else f"{last} at the {len(statuses)}th time"
