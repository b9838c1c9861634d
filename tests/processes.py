"""The function as a real process under a real server, for tests that kill it.

Owns its start, its end and its log. A group never outlives its test, not even a killed
test run (demo/server_process.py's guard sees to that). Must never import `function`.
"""

import contextlib
import http.client
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from demo.server_process import ProcessGroup

ROOT: Final = Path(__file__).parents[1]
#: Starting takes about a second; three test runs on two slow cores take longer.
START_DEADLINE_S: Final = 60.0
#: For whatever else must happen sooner or later.
DEADLINE_S: Final = 20.0
_POLL_S: Final = 0.02
#: Below the range from which the kernel takes the ports of clients, so that nobody
#: gets ours between a kill and the restart.
_PORTS: Final = range(20_000, 32_000)

Server = Literal["functions-framework", "gunicorn"]


class StartFailed(Exception):
    """The function ended instead of answering; `status` is its exit status."""

    def __init__(self, status: int, log: str) -> None:
        super().__init__(f"ended with status {status}; its log:\n{log}")
        self.status = status
        self.log = log


class FunctionProcess:
    """The function under one of its servers; a context manager that starts it.

    Args:
        directory: gets its log, and is its working folder's only trace.
        env: its environment, whole: nothing of ours is passed on but PATH.
        server: the bare `functions-framework` command, or gunicorn with
            function/gunicorn.conf.py.
        source: the file with `handle_topup`; may be one that wraps function/main.py.
        port: 0: a free one, the same at every start of this object.

    """

    def __init__(
        self,
        directory: Path,
        *,
        env: Mapping[str, str],
        server: Server = "gunicorn",
        source: Path | str = "function/main.py",
        port: int = 0,
    ) -> None:
        self.port = port or free_port()
        self._env = dict(env)
        self._server = server
        self._source = str(source)
        self._log = directory / f"function-{self.port}.log"
        self._group: ProcessGroup | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Where events are posted to."""
        return f"http://127.0.0.1:{self.port}/"

    @property
    def process_group_id(self) -> int:
        """What to signal to reach the server, its workers and nobody else."""
        return self._running().id

    def start(self) -> None:
        """Start it; on return `/healthz` answers.

        Raises:
            StartFailed: it ended by itself.

        """
        assert self._group is None, "it runs already"
        env = ["env", "-i", f"PATH={os.environ['PATH']}", f"PYTHONPATH={ROOT}"]
        given = [f"{name}={value}" for name, value in self._env.items()]
        command = [*env, *given, f"PORT={self.port}", *self._command()]
        self._group = ProcessGroup(command, log=self._log, cwd=ROOT)
        end = time.monotonic() + START_DEADLINE_S
        while not self._is_healthy():
            status = self._group.process.poll()
            if status is not None:
                self.kill()
                raise StartFailed(status, self.log())
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"not healthy in time; its log:\n{self.log()}")
            time.sleep(_POLL_S)

    def terminate(self) -> None:
        """Send SIGTERM as the kubelet does, to the server alone, and don't wait."""
        self._running().process.terminate()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended by itself, and return its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not.

        """
        status = self._running().process.wait(timeout_s)
        self.kill()
        return status

    def stop(self, timeout_s: float = DEADLINE_S) -> int:
        """SIGTERM, then wait; returns the exit status.

        Raises:
            subprocess.TimeoutExpired: it goes on all the same.

        """
        self.terminate()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL the whole group; on return none of its processes lives."""
        if self._group is None:
            return
        group, self._group = self._group, None
        group.kill()
        # A worker is no child of ours: wait until the kernel is done with it.
        end = time.monotonic() + DEADLINE_S
        while living(group.id):
            assert time.monotonic() < end, "a killed process lives"
            time.sleep(_POLL_S)

    def restart(self) -> None:
        """Start it again on the same port, whatever way it ended."""
        self.kill()
        self.start()

    def workers(self) -> list[int]:
        """The processes of the group that serve: all but the guard and the server."""
        group = self._running()
        known = {group.id, group.process.pid}
        return [each for each in living(group.id) if each not in known]

    def log(self) -> str:
        """What all starts of this object wrote to standard output and error."""
        with contextlib.suppress(FileNotFoundError):
            return self._log.read_text("utf-8", errors="replace")
        return ""

    def _running(self) -> ProcessGroup:
        assert self._group is not None, "it does not run"
        return self._group

    def _command(self) -> list[str]:
        scripts = Path(sys.executable).parent
        if self._server == "functions-framework":
            command = [str(scripts / "functions-framework"), "--source", self._source]
            return [*command, "--target", "handle_topup", "--host", "127.0.0.1"]
        return [
            str(scripts / "gunicorn"),
            *("--config", "function/gunicorn.conf.py"),
            *("--bind", f"127.0.0.1:{self.port}"),
            f"functions_framework:create_app('handle_topup', '{self._source}')",
        ]

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            with connection.getresponse() as answer:
                return answer.status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def function_env(
    database_url: str, recharge_api_url: str, **settings: object
) -> dict[str, str]:
    """An environment with deadlines that suit a test; `settings` replaces any of it.

    A setting `x_y` becomes the variable `X_Y`.
    """
    env: dict[str, object] = {
        "ledger_database_url": database_url,
        "ledger_lease_margin_s": 1,
        "ledger_timeout_s": 2,
        "recharge_api_url": recharge_api_url,
        "recharge_api_timeout_s": 2,
        "recharge_api_deadline_s": 3,
        "recharge_api_settle_s": 5,
        "event_delivery_timeout_s": 6,
        "event_read_timeout_s": 1,
        "server_request_timeout_s": 10,
        "server_graceful_timeout_s": 8,
        "server_termination_grace_s": 10,
    }
    return {name.upper(): str(value) for name, value in (env | settings).items()}


def free_port() -> int:
    """A port on which nobody listens, and that no client is given by chance."""
    while True:
        port = random.choice(_PORTS)  # noqa: S311 # no cryptography
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def living(group: int) -> list[int]:
    """The processes of a group; a zombie is dead and waits for its parent only.

    Unless it is a zombie by its first thread alone: while another one is on its way
    out, the process still listens.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # The name in parentheses may contain blanks; then: state, ppid, pgrp.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
            threads = len(list(entry.with_name("task").iterdir()))
            if int(pgrp) == group and (state not in "ZX" or threads > 1):
                found.append(int(entry.parent.name))
    return found


def kill_group(group: int) -> None:
    """SIGKILL from outside, as a node that dies would."""
    os.killpg(group, signal.SIGKILL)


def processes_of(directory: Path) -> list[str]:
    """The living processes that know the run's folder from command or environment."""
    needle = os.fsencode(directory)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
            text = (entry / "cmdline").read_bytes()
            known = needle in text or needle in (entry / "environ").read_bytes()
        except OSError:
            continue
        if known and stat.rpartition(")")[2].split()[0] not in "ZX":
            found.append(f"{entry.name}: {text!r}")
    return found
