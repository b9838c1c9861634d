"""The naive handler, killed between its commit and its 2xx: for the story.

Owns that one boundary, as demo/crash_points.py does for the function; must never change
what the handler does. The file named in CRASH_FILE arms it, and is taken away before
the kill.
"""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flask

from demo.naive import handle_topup

__all__ = ["handle_topup"]

_FILE = Path(os.environ["CRASH_FILE"])
_application = flask.current_app.wsgi_app


def _crash_before_answer(
    environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    answer = list(_application(environ, start_response))
    if environ["REQUEST_METHOD"] == "POST" and _FILE.exists():
        _FILE.unlink()
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return answer


flask.current_app.wsgi_app = _crash_before_answer  # type: ignore[method-assign]
