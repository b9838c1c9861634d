"""A server as a process: started, ended by every means that a test needs, never left.

Owns groups of processes and what every private server has: a folder, a log, a port. A
server keeps everything in the folder it is given, and never outlives the process that
started it. Must never start or configure a service of the machine, print a password, or
know which server it is.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

#: The project's own folder.
PROJECT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
#: Ports are taken below the range from which the kernel gives ports to outgoing
#: connections: such a port can't be taken between a server's death and its restart.
PORTS = range(20_000, 32_000)
LOG_TAIL_LINES = 25
POLL_S = 0.05


class ServiceMissing(Exception):
    """A program or a given server is not there; says which, and how to get it."""


class ServerError(Exception):
    """A server did not start, died, or does not end."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at the moment."""
    for port in random.sample(PORTS, k=200):
        with socket.socket() as probe:
            # As servers do: else the remains of closed connections look like a server.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port
    raise ServerError(f"no free port on {LOOPBACK} from {PORTS[0]} to {PORTS[-1]}")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first instant on."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


class ProcessGroup:
    """A process with all that it starts, which ends when this process ends.

    Even when this process is killed with SIGKILL: the group's leader is a shell that
    waits for the end of a pipe whose other end is only here, and then kills its group.
    The kernel's own PR_SET_PDEATHSIG is not used, because it follows the *thread* that
    started the process (a server started from a pool's thread would die with it), and
    setting it needs code between fork and exec, which can hang where threads run. A
    group of its own also keeps a terminal's Ctrl-C away: we end servers in order. Who
    forks this process without exec holds the pipe open, too, for as long as it lives.
    """

    # When this process dies the kernel sends a paused group SIGHUP: the guard is deaf.
    _GUARD = ("/bin/sh", "-c", "trap '' HUP; read -r parent_is_gone; kill -KILL 0")

    def __init__(self, command: Sequence[str | Path], *, log: Path, cwd: Path) -> None:
        # The guard is there first: there is no instant at which nobody watches.
        self._guard = subprocess.Popen(
            self._GUARD,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        self.id = self._guard.pid
        try:
            with log.open("ab") as out:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    process_group=self.id,
                )
        except BaseException:
            self._end_guard()
            raise

    def terminate(self, timeout_s: float) -> None:
        """End the process by SIGTERM; the whole group by SIGKILL after `timeout_s`."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def pause(self) -> None:
        """Stop the whole group by SIGSTOP, as a frozen machine would; `resume` ends it.

        The guard goes on: it must be able to kill what it guards.
        """
        os.killpg(self.id, signal.SIGSTOP)
        self._guard.send_signal(signal.SIGCONT)

    def resume(self) -> None:
        """Let the group go on; no effect if it was not paused."""
        os.killpg(self.id, signal.SIGCONT)

    def kill(self) -> None:
        """End the whole group by SIGKILL; it is gone when this returns."""
        self._end_guard()
        self.process.wait()

    def _end_guard(self) -> None:
        # As long as the guard is not waited for, its id can't be another group's.
        if self._guard.returncode is None:
            # Where others ended the group, nothing or only a zombie is left to signal.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.id, signal.SIGKILL)
            self._guard.communicate()


def run(command: Sequence[str | Path], *, log: Path, cwd: Path) -> None:
    """Run a command to its end, with its output appended to `log`.

    Raises ServerError with the end of the log when it fails.
    """
    group = ProcessGroup(command, log=log, cwd=cwd)
    try:
        status = group.process.wait()
    finally:
        group.kill()
    if status:
        name = Path(command[0]).name
        raise ServerError(f"{name} ended with status {status}; its log:\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


class Server:
    """A server process with its folder: made ready, started, ended, started again.

    A context manager, which starts it and stops it. Whatever way it ended, `start`
    brings it back on the same port with the same data and the same passwords. A
    subclass says how its folder is made, how it is started, and what proves that it
    answers.
    """

    name: ClassVar[str] = "server"
    start_timeout_s: ClassVar[float] = 60.0
    stop_timeout_s: ClassVar[float] = 20.0

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.log = self.directory / f"{self.name}.log"
        self._group: ProcessGroup | None = None
        self._is_prepared = False

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises ServiceMissing when a program is not installed, ServerError with the end
        of the log when it dies or does not answer within `start_timeout_s`.
        """
        if self._group is not None:
            raise RuntimeError(f"{self.name} is started already")
        if not self._is_prepared:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            self._prepare()
            self._is_prepared = True
        self._group = ProcessGroup(self._command(), log=self.log, cwd=self.directory)
        try:
            self._wait_until_it_answers(self._group)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL when that takes too long; again: no effect."""
        if self._group is not None:
            self._group.terminate(self.stop_timeout_s)
            self._group = None

    def kill(self) -> None:
        """End it by SIGKILL of its process group, as a crash would."""
        if self._group is not None:
            self._group.kill()
            self._group = None

    def pause(self) -> None:
        """Stop it by SIGSTOP: it keeps its connections, and answers nobody."""
        self._running().pause()

    def resume(self) -> None:
        """Let it go on."""
        self._running().resume()

    def restart(self) -> None:
        """Stop it if it runs, and start it again."""
        self.stop()
        self.start()

    @property
    def process_group_id(self) -> int:
        """The id of the running process group."""
        return self._running().id

    def _running(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._group

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_it_answers(self, group: ProcessGroup) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while True:
            status = group.process.poll()
            if status is not None:
                raise ServerError(
                    f"{self.name} ended with status {status}; its log:\n"
                    + _tail(self.log)
                )
            if self._answers():
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} does not answer after {self.start_timeout_s:.0f} s; "
                    f"its log:\n{_tail(self.log)}"
                )
            time.sleep(POLL_S)

    def _prepare(self) -> None:
        """Make the folder ready, once, before the first start."""
        raise NotImplementedError

    def _command(self) -> list[str | Path]:
        """What starts the server in the foreground."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether a client gets an answer the way clients do."""
        raise NotImplementedError


def output(command: Sequence[str]) -> bytes:
    """All that a short command prints, whatever its status."""
    asked = subprocess.run(command, capture_output=True, check=False)
    return asked.stdout + asked.stderr


def given_file(env: Mapping[str, str], name: str, beside: str) -> Path:
    """The file that a variable names; `beside` is the variable that demands it."""
    value = env.get(name)
    if not value:
        raise ServiceMissing(f"{beside} is set, so {name} must be set, too")
    path = Path(value)
    if not path.is_file():
        raise ServiceMissing(f"{name} names a file that is not there: {value}")
    return path
