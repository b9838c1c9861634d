"""The production code, killed at a named boundary: for the story and the tests.

Owns the boundaries; must never change what the function does: it listens to
SQLAlchemy's and Python's own events and wraps the WSGI app from outside. The function
is started by `functions-framework --source demo/crash_points.py` in place of
function/main.py, the resolver by `python -m demo.crash_points resolver run`.

The file named in CRASH_FILE arms it: its text is the boundary's name. The file is
taken away before the kill, so that it happens once, however often it is restarted.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import flask
from sqlalchemy import Engine, event

#: Every boundary, in the order in which one delivery passes it.
POINTS: Final = (
    "request_read",
    "claim_unsent",
    "claim_committed",
    "call_unsent",
    "answer_arrived",
    "settlement_committed",
    "response_unwritten",
    "response_written",
)

_FILE: Final = Path(os.environ["CRASH_FILE"])
_transaction: Final = threading.local()


def crash_at(point: str) -> None:
    """Kill the whole process group, if this boundary is the armed one."""
    try:
        is_armed = _FILE.read_text("ascii").strip() == point
        if is_armed:
            # Whoever takes it away crashes: two threads would otherwise both.
            _FILE.unlink()
    except FileNotFoundError:
        return
    if is_armed:
        # The group: a dead gunicorn master would leave a working worker.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _is_claim(statement: str) -> bool:
    return (
        "topup" in statement[:20] and "lease_until" in statement.partition("WHERE")[0]
    )


def _is_settlement(statement: str) -> bool:
    is_change = statement.startswith("UPDATE topup SET status")
    return is_change and not _is_claim(statement)


@event.listens_for(Engine, "before_cursor_execute")
def _before(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    if _is_claim(statement):
        crash_at("claim_unsent")
    elif _is_settlement(statement):
        crash_at("answer_arrived")


@event.listens_for(Engine, "after_cursor_execute")
def _after(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
    if _is_claim(statement):
        crash_at("claim_committed")
    elif statement.startswith("BEGIN"):
        _transaction.is_open = True
    elif statement == "COMMIT":
        _transaction.is_open = False
        crash_at("settlement_committed")
    elif _is_settlement(statement) and not getattr(_transaction, "is_open", False):
        crash_at("settlement_committed")


def _audit(name: str, _arguments: tuple[Any, ...]) -> None:
    # Python tells of each send of http.client just before it: what we send ourselves
    # goes to the recharge API.
    if name == "http.client.send":
        crash_at("call_unsent")


sys.addaudithook(_audit)


class _Boundaries:
    """The WSGI app with the boundaries before and after it."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            crash_at("request_read")
        answer = list(self._application(environ, start_response))
        crash_at("response_unwritten")
        return _Written(answer)


class _Written:
    """An answer whose end is known: servers close it when all is written."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    def __iter__(self) -> Any:
        return iter(self._parts)

    def close(self) -> None:
        crash_at("response_written")


if flask.has_app_context():
    from function.main import handle_topup

    __all__ = ["handle_topup"]

    flask.current_app.wsgi_app = _Boundaries(  # type: ignore[method-assign]
        flask.current_app.wsgi_app
    )

if __name__ == "__main__":
    from function.cli import main

    main()
