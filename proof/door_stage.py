"""The function under its own server, with a ledger and a recharge API beside it.

Owns their start, their end and the folder of their traces; must never judge, nor leave
a process behind.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from certs.make_certs import make_certs
from demo.mariadb import MariaDbServer
from demo.processes import START_TIMEOUT_S, FunctionPart, RechargeApiPart
from demo.server_process import LOOPBACK, PROJECT
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate
from function.operations import Operations
from function.rules import rules_of
from proof.bent_requests import PAUSE_REASON, PAUSED_CHANNEL
from proof.examination import Evidence, Examination

Ledger = Literal["sqlite", "mariadb"]

#: The function as it is, but for one planted error.
SOURCE: Final = PROJECT / "proof" / "planted_error.py"

#: Generous, so that no busy machine is taken for a fault; but what is stalled is given
#: up soon. In the order that the function checks at start (README, Settings).
DEADLINES: Final = {
    "EVENT_READ_TIMEOUT_S": "0.6",
    "LEDGER_TIMEOUT_S": "10",
    "RECHARGE_API_TIMEOUT_S": "10",
    "RECHARGE_API_DEADLINE_S": "15",
    "LEDGER_LEASE_MARGIN_S": "5",
    "RECHARGE_API_SETTLE_S": "25",
    "EVENT_DELIVERY_TIMEOUT_S": "30",
    "SERVER_REQUEST_TIMEOUT_S": "60",
    "SERVER_GRACEFUL_TIMEOUT_S": "20",
    "SERVER_TERMINATION_GRACE_S": "30",
}


class GunicornPart(FunctionPart):
    """The function under gunicorn with function/gunicorn.conf.py, as in its image."""

    def __init__(self, log: Path, source: Path) -> None:
        super().__init__(log, source=str(source), signature="http")

    def restart(self) -> None:
        """Start it again with the same settings.

        Raises:
            PartFailed: it does not answer.

        """
        command: list[str | Path] = [
            Path(sys.executable).parent / "gunicorn",
            *("--config", "function/gunicorn.conf.py"),
            *("--bind", f"{LOOPBACK}:{self.port}"),
            f"functions_framework:create_app('handle_topup', '{self._source}')",
        ]
        self.run(command, self._env)
        self.wait_until(self._answers, START_TIMEOUT_S)

    @property
    def worker(self) -> int:
        """The process that serves."""
        server = self._running().process.pid
        place = Path(f"/proc/{server}/task/{server}/children")
        (worker,) = place.read_text("ascii").split()
        return int(worker)


@dataclass(frozen=True)
class Stage:
    """All of it, running."""

    function: GunicornPart
    examination: Examination
    evidence: Evidence


@contextmanager
def staged(directory: Path, ledger: Ledger, source: Path = SOURCE) -> Iterator[Stage]:
    """Start everything in an empty folder, and end it.

    The API is of the kind that executes a repeated key again: a double is a double.

    Args:
        directory: for the ledger, the book and the logs.
        ledger: which database it is in.
        source: the file with `handle_topup`.

    Raises:
        PartFailed: a part does not start.
        ServiceMissing: MariaDB is not installed.
        ServerError: MariaDB does not start.

    """
    book, log = directory / "book.jsonl", directory / "function.log"
    with ExitStack() as stack:
        api = stack.enter_context(
            RechargeApiPart(directory / "recharge-api.log", book=book)
        )
        env = {
            **_ledger_env(stack, directory, ledger),
            **DEADLINES,
            "RECHARGE_API_URL": api.url,
            "RECHARGE_API_KIND": "lookup",
        }
        settings = Settings.from_env(env)
        engine = make_engine(settings)
        stack.callback(engine.dispose)
        migrate(engine, rules_of(settings))
        Operations(engine).pause(PAUSED_CHANNEL, PAUSE_REASON)
        api.start("lookup")
        function = stack.enter_context(GunicornPart(log, source))
        function.start(env)
        evidence = Evidence(engine, book, log)
        yield Stage(function, Examination(function.port, evidence), evidence)


def _ledger_env(stack: ExitStack, directory: Path, ledger: Ledger) -> dict[str, str]:
    if ledger == "sqlite":
        return {"LEDGER_DATABASE_URL": f"sqlite:///{directory / 'ledger.db'}"}
    certificates = make_certs(directory / "certs", force=True)
    server = MariaDbServer(directory / "mariadb", certificates, fast=True)
    stack.enter_context(server)
    return {
        "LEDGER_DATABASE_URL": server.create_database("ledger"),
        "LEDGER_TLS_CA_FILE": str(certificates.ca),
    }
