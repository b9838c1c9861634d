"""Scene 6, on a real broker only: sources come and go in one consumer group.

Owns that one scene; as demo/scenes.py it must never judge what it shows.
"""

from functools import partial
from typing import Final

from demo.account import Account
from demo.faults import Fault, Script
from demo.producers import App, Order, subscriber
from demo.scenes import Facts, in_parallel
from demo.stage import TIMEOUT_S, Stage

_ORDERS: Final = 240
_SUBSCRIBERS: Final = 16
#: The API takes its time, so that there is a middle in which something can happen.
_CALL_S: Final = 0.04
_KILL_AFTER: Final = _ORDERS // 3
#: The broker gives a killed source up after 3 to 6 s; the rest takes about 5 s.
_AFTER_KILL_TIMEOUT_S: Final = 30.0


def rebalance(stage: Stage, account: Account) -> Facts:
    """Scene 6: one of two sources is killed, another joins, partitions move."""
    account.heading("6  Rebalance")
    stage.play("replay")
    stage.stop_source()
    script = Script(Fault.EXECUTE_THEN_LATE, times=None, delay_s=_CALL_S)
    stage.api.misbehave(script)
    executed_before = _executions(stage)
    redelivered_before = stage.delivered().redeliveries
    account.say(
        f"{_ORDERS} top-ups of {_SUBSCRIBERS} subscribers, and two sources, each a "
        "process, which share the partitions as one consumer group. In the middle one "
        "of them is killed with SIGKILL, and a third joins: the broker hands the "
        "partitions over, and what was not committed comes again."
    )
    sources = [stage.source_process(f"source-{name}") for name in "ab"]
    apps = [stage.app(f"group-{name}", "binary") for name in "xy"]
    in_parallel([partial(_write, app) for app in apps])

    def executed() -> int:
        return _executions(stage) - executed_before

    account.progress("until the kill", _KILL_AFTER, executed, TIMEOUT_S)
    at_kill = executed()
    sources.pop(0).kill()
    sources.append(stage.source_process("source-c"))
    account.progress("after the kill", _ORDERS, executed, _AFTER_KILL_TIMEOUT_S)
    for source in sources:
        source.stop()
    # Whoever comes last finds what nobody has committed.
    stage.start_source()
    stage.wait_until_consumed()
    redelivered = stage.delivered().redeliveries - redelivered_before
    account.say(
        f"Killed after {at_kill} recharges. {redelivered} deliveries were repetitions; "
        f"the book has {executed()} recharges of {_ORDERS} orders."
    )
    return {"at_kill": at_kill, "redeliveries": redelivered, "executed": executed()}


def _write(app: App) -> None:
    for number in range(_ORDERS // 2):
        msisdn = subscriber(400 + number % _SUBSCRIBERS)
        app.send(Order(f"{number:03d}", app.channel, msisdn))
    app.flush()


def _executions(stage: Stage) -> int:
    return sum(entry.entry == "executed" for entry in stage.book())
