"""`make run`: the function alone on one port, with a sandbox recharge API beside it.

Owns nothing but their start and end; must never be taken for a deployment: the ledger
is a SQLite file, and the server can't drain.
"""

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Final

from demo.processes import FunctionPart, PartFailed, RechargeApiPart
from demo.server_process import PROJECT
from function.config import Settings
from function.database import make_engine
from function.migrate import migrate
from function.rules import rules_of

DIRECTORY = PROJECT / "build" / "run"

_PORTS_END: Final = 65_536


def main() -> int:
    """Run until Ctrl-C or SIGTERM.

    Exit status 1 if a part does not start, 2 for a PORT that is none.
    """
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    api = RechargeApiPart(DIRECTORY / "recharge-api.log", book=DIRECTORY / "book.jsonl")
    log = DIRECTORY / "function.log"
    function = FunctionPart(log, source="function/main.py", signature="http")
    port = os.environ.get("PORT") or "8080"
    if not port.isdecimal() or not 0 < int(port) < _PORTS_END:
        sys.stderr.write("PORT must be a number from 1 to 65535\n")
        return 2
    function.port = int(port)
    with api, function:
        try:
            _require_free(function.port)
            api.start("replay")
            function.start(_environment(api.url))
        except PartFailed as failure:
            sys.stderr.write(f"{failure}\n")
            return 1
        _tell(function, api, log)
        ended.wait()
    return 0


def _require_free(port: int) -> None:
    """Raise unless nobody listens there: another's answer would be taken for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise PartFailed(
                f"port {port} is taken: end what listens there, or say make run PORT=…"
            ) from None


def _environment(recharge_api_url: str) -> dict[str, str]:
    env = {
        "LEDGER_DATABASE_URL": f"sqlite:///{DIRECTORY / 'ledger.db'}",
        "RECHARGE_API_URL": recharge_api_url,
        "RECHARGE_API_KIND": "replay",
    }
    settings = Settings.from_env(env)
    engine = make_engine(settings)
    migrate(engine, rules_of(settings))
    engine.dispose()
    return env


def _tell(function: FunctionPart, api: RechargeApiPart, log: Path) -> None:
    print(f"The function listens on {function.url}")
    print(f"The sandbox recharge API listens on {api.url}")
    print(f"Its book, the ledger and the logs are in {log.parent.relative_to(PROJECT)}")
    print("Ctrl-C ends both.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
