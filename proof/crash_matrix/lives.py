"""The function and the resolver as processes, each in a group of its own.

Owns how they are started fast (forked from a parent that has imported everything, and
has run none of it) and how they end. It must never change what they do: they run
gunicorn with function/gunicorn.conf.py, and `topup resolver run`. None outlives us.
"""

import ctypes
import http.client
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from demo.server_process import LOOPBACK, PROJECT, free_port

#: It takes a third of a second; dozens at once on two cores take longer.
START_TIMEOUT_S: Final = 60.0
_END_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.03
#: Linux's prctl: the signal that a process gets when its parent ends.
_SET_DEATH_SIGNAL: Final = 1
#: What the parent imports once; main.py and gunicorn.conf.py each process loads itself.
_WARM: Final = (
    "proof.crash_matrix.lives",
    "function.cli",
    "function.door",
    "function.events",
    "function.resolver",
    "functions_framework",
    "gunicorn.app.wsgiapp",
    "gunicorn.workers.gthread",
    "pymysql",
    "sqlalchemy.dialects.mysql.pymysql",
)


class LifeFailed(Exception):
    """A process of ours does not start or does not end; names its log."""


class Nursery:
    """Starts lives; forks them from one warm parent."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_WARM))
        self._lock = threading.Lock()
        self._ports: set[int] = set()

    def function(self, env: Mapping[str, str], log: Path) -> "Life":
        """A function under gunicorn; on return it answers.

        Raises:
            LifeFailed: it does not.

        """
        port = self._port()
        life = self._start(_serve, env, log, port)
        life.wait_until(lambda: _is_healthy(port))
        return life

    def resolver(self, env: Mapping[str, str], log: Path) -> "Life":
        """A resolver; its first round may begin at any time."""
        return self._start(_resolve, env, log, 0)

    def _start(
        self, target: Callable[..., None], env: Mapping[str, str], log: Path, port: int
    ) -> "Life":
        process = self._context.Process(
            target=target, args=(dict(env), str(log), port), daemon=True
        )
        with self._lock:
            process.start()
        return Life(process, log, port)

    def _port(self) -> int:
        """A free port that no cell of this run was given."""
        with self._lock:
            while (port := free_port()) in self._ports:
                pass
            self._ports.add(port)
            return port


class Life:
    """One process with all that it starts."""

    def __init__(
        self, process: multiprocessing.process.BaseProcess, log: Path, port: int
    ) -> None:
        self._process = process
        self._log = log
        #: Where it listens; 0: nowhere.
        self.port = port

    def kill(self) -> None:
        """SIGKILL to the whole group, without waiting."""
        pid = self._process.pid
        # An id that was waited for may be another's by now.
        if pid is None or not self.is_alive:
            return
        for end in (os.killpg, os.kill):
            try:
                end(pid, signal.SIGKILL)
            except ProcessLookupError:
                # Not the leader of a group yet, or ended already.
                continue
            return

    def end(self) -> None:
        """SIGKILL to the whole group; on return its leader is dead.

        Raises:
            LifeFailed: it lives on.

        """
        self.kill()
        self.wait_until_dead()

    def wait_until_dead(self) -> None:
        """Wait for an end that somebody else brings about.

        Raises:
            LifeFailed: it lives on.

        """
        self._process.join(_END_TIMEOUT_S)
        if self._process.is_alive():
            raise LifeFailed(f"it lives on; read {self._log}")

    @property
    def is_alive(self) -> bool:
        """Whether its leader runs."""
        return self._process.is_alive()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for what this process must bring about.

        Raises:
            LifeFailed: it ended before, or took too long.

        """
        end_s = time.monotonic() + START_TIMEOUT_S
        while not is_so():
            if not self.is_alive:
                raise LifeFailed(f"it ended by itself; read {self._log}")
            if time.monotonic() > end_s:
                raise LifeFailed(f"it is not ready in time; read {self._log}")
            time.sleep(_POLL_S)


def _serve(env: dict[str, str], log: str, port: int) -> None:
    """Be the container's command."""
    _become(env, log)
    from gunicorn.app import wsgiapp  # noqa: PLC0415 -- not in our own process.

    bind = f"{LOOPBACK}:{port}"
    sys.argv = ["gunicorn", "--config", "function/gunicorn.conf.py", "--bind", bind]
    wsgiapp.run()


def _resolve(env: dict[str, str], log: str, _port: int) -> None:
    """Be `topup resolver run`."""
    _become(env, log)
    from function.cli import main  # noqa: PLC0415 -- likewise.

    main(["resolver", "run"])


def _become(env: dict[str, str], log: str) -> None:
    """A process like any that a container starts: own group, environment, output."""
    os.setsid()
    # The parent that forks us has one thread, so its end is what this follows; it
    # ends with us. gunicorn's worker ends with gunicorn.
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Among what we inherit is the pipe by which our parent sees that the run has ended.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(PROJECT)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
