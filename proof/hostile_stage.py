"""The deployed function, and a hostile recharge API before it.

Owns their start, their end and the deliveries; must never judge.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Final, Literal

import requests
from sqlalchemy import select

from demo.processes import Part
from demo.server_process import PROJECT
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate
from function.rules import rules_of
from function.schema import topup
from proof.door_stage import GunicornPart
from proof.examination import footprint_of
from proof.hostile_api import HostileApi
from proof.hostile_judge import Row, Told

Kind = Literal["none", "lookup"]

DEADLINES: Final = {
    "LEDGER_TIMEOUT_S": "5",
    "RECHARGE_API_TIMEOUT_S": "1.5",
    "RECHARGE_API_DEADLINE_S": "2",
    "LEDGER_LEASE_MARGIN_S": "1",
    "RECHARGE_API_SETTLE_S": "3.5",
    "EVENT_DELIVERY_TIMEOUT_S": "8",
    "RESOLVER_INTERVAL_S": "0.5",
    "SERVER_REQUEST_TIMEOUT_S": "10",
    "SERVER_GRACEFUL_TIMEOUT_S": "5",
    "SERVER_TERMINATION_GRACE_S": "8",
}
#: Deliveries at a time: as many as the function has threads.
_THREADS: Final = 8
#: So long a delivery may take: deadline, one look-up, two statements, with a margin.
ANSWER_S_MAX: Final = 12.0
_REDELIVERY_S: Final = 0.1
_AGAIN: Final = frozenset({409, 503})


@dataclass(slots=True)
class Played:
    """What happened, for the judge and the report."""

    rows: dict[str, Row]
    told: dict[str, Told]
    answers: Counter[int]
    #: Deliveries that were not answered in their time, or not at all.
    unanswered: list[str]
    rss_kib_before: int
    rss_kib_after: int
    is_same_worker: bool


@dataclass
class Stage:
    """The function, running."""

    function: GunicornPart
    env: dict[str, str]
    _local: local = field(default_factory=local)

    def deliver(self, name: str, number: int, end_s: float) -> tuple[Told | None, str]:
        """Deliver an order until it is taken; the answer, or what went wrong.

        What still waits at `end_s`, on the monotonic clock, is left as it is.
        """
        while True:
            try:
                answer = self._post(name, number)
            except requests.RequestException as error:
                return None, f"{name}: {type(error).__name__}"
            if answer.status_code not in _AGAIN or time.monotonic() > end_s:
                break
            time.sleep(_REDELIVERY_S)
        reference = answer.json().get("reference") if answer.ok else None
        return Told(answer.status_code, reference), ""

    def _post(self, name: str, number: int) -> requests.Response:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
        session: requests.Session = self._local.session
        return session.post(
            self.function.url,
            json={
                "rechargeId": name,
                "channel": "app",
                "msisdn": f"+39333{number:07}",
                "amountMinor": 500,
                "currency": "EUR",
                "requestedAt": "2026-01-02T03:04:05Z",
            },
            headers={
                "ce-specversion": "1.0",
                "ce-id": name,
                "ce-source": "/hostile",
                "ce-type": "com.example.topup.requested.v1",
            },
            timeout=ANSWER_S_MAX,
        )

    def rows(self) -> dict[str, Row]:
        """What the ledger says of each order."""
        engine = make_engine(Settings.from_env(self.env))
        columns = topup.c
        query = select(
            columns.idempotency_key, columns.status, columns.reference, columns.reason
        )
        try:
            with engine.connect() as connection:
                found = connection.execute(query).all()
        finally:
            engine.dispose()
        return {row[0]: Row(row[1], row[2], row[3]) for row in found}


@contextmanager
def staged(
    directory: Path, api: HostileApi, kind: Kind, source: str = "function/main.py"
) -> Iterator[Stage]:
    """Start the function, with a resolver where the API can be asked.

    Args:
        directory: for the ledger, the profile and the logs.
        api: listens already.
        kind: of the API.
        source: the file with `handle_topup`.

    Raises:
        PartFailed: a part does not start.

    """
    env = {
        **DEADLINES,
        "LEDGER_DATABASE_URL": f"sqlite:///{directory / 'ledger.db'}",
        "RECHARGE_API_URL": api.url,
        "RECHARGE_API_PROFILE": str(_profile(directory)),
        "RECHARGE_API_KIND": kind,
    }
    settings = Settings.from_env(env)
    engine = make_engine(settings)
    migrate(engine, rules_of(settings))
    engine.dispose()
    with ExitStack() as stack:
        log = directory / "function.log"
        function = stack.enter_context(GunicornPart(log, PROJECT / source))
        function.start(env)
        if kind == "lookup":
            resolver = Part("the resolver", directory / "resolver.log")
            stack.enter_context(resolver)
            command = [sys.executable, "-m", "function.cli", "resolver", "run"]
            resolver.run(command, env)
        yield Stage(function, env)


def play(
    stage: Stage,
    *,
    seconds: float,
    orders: int,
    advance: Callable[[], None] = lambda: None,
) -> Played:
    """Deliver orders, each of a subscriber of its own.

    Args:
        stage: where.
        seconds: no order is begun later than this.
        orders: no more than so many.
        advance: told of each order that was answered.

    """
    worker = stage.function.worker
    before = footprint_of(worker)
    answers: Counter[int] = Counter()
    told: dict[str, Told] = {}
    unanswered: list[str] = []
    end_s = time.monotonic() + seconds

    def deliver_some(first: int) -> None:
        for number in range(first, orders, _THREADS):
            if time.monotonic() > end_s:
                return
            name = f"r{number}"
            answer, fault = stage.deliver(name, number, end_s)
            if answer is None:
                unanswered.append(fault)
            else:
                told[f"app:{name}"] = answer
                answers[answer.status] += 1
            advance()

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(deliver_some, range(_THREADS)))
    is_same = stage.function.is_alive and stage.function.worker == worker
    after = footprint_of(worker) if is_same else before
    return Played(
        stage.rows(),
        told,
        answers,
        unanswered,
        before.rss_kib,
        after.rss_kib,
        is_same,
    )


def _profile(directory: Path) -> Path:
    """The generic profile, for an API that repeats no key in its answers.

    Where it does, the key is compared, and hides what is wrong with the framing.
    """
    text = (PROJECT / "function" / "profiles" / "generic.toml").read_text("utf-8")
    line = 'key = "idempotencyKey"\n'
    if text.count(line) != 1:
        raise AssertionError("the generic profile has no such line any more")
    path = directory / "hostile.toml"
    path.write_text(text.replace(line, ""), "utf-8")
    return path
