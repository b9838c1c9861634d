"""The function and the sandbox recharge API as processes of the story.

Owns their start, their end and their logs; nothing outlives the process that started
it, not even when that one is killed (demo/server_process.py's guard sees to that). Must
never import `function`: what is shown is what runs by itself.
"""

import http.client
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Self

import requests

from demo.faults import RANDOM_FAULTS, Fault, Script
from demo.server_process import (
    LOOPBACK,
    PROJECT,
    ProcessGroup,
    free_port,
    write_private,
)

#: It takes about a second; on a busy laptop it may take long.
START_TIMEOUT_S: Final = 45.0
_STOP_TIMEOUT_S: Final = 5.0
_POLL_S: Final = 0.02


class PartFailed(Exception):
    """A part of the story ended, or does not do what it should; names its log."""


class Part:
    """A process that is started, killed and started again.

    Args:
        name: what it is called in messages.
        log: gets the output of all its lives.

    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._group: ProcessGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def group_id(self) -> int:
        """What to kill to reach it and all that it started."""
        return self._running().id

    def run(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        """Start a command in a group of its own; it inherits nothing but PATH."""
        self.kill()
        inherited = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
        given = [f"{name}={value}" for name, value in {**inherited, **env}.items()]
        self._group = ProcessGroup(
            ["env", "-i", *given, *command], log=self.log, cwd=PROJECT
        )

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        """Wait for a condition that this process must bring about.

        Raises:
            PartFailed: it ended before, or took too long.

        """
        end_s = time.monotonic() + timeout_s
        while not is_so():
            status = self._running().process.poll()
            if status is not None:
                raise self.failed(f"ended with status {status}")
            if time.monotonic() > end_s:
                raise self.failed(f"is not ready after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def wait_until_dead(self, timeout_s: float) -> None:
        """Wait until somebody else has killed it.

        Raises:
            PartFailed: nobody has.

        """
        end_s = time.monotonic() + timeout_s
        while self._running().process.poll() is None:
            if time.monotonic() > end_s:
                raise self.failed(f"lives after {timeout_s:g} s, and should not")
            time.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """End the whole group by SIGKILL; no effect if it does not run."""
        if self._group is not None:
            self._group.kill()
            self._group = None

    def stop(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """End it in order by SIGTERM, by SIGKILL when that takes too long."""
        if self._group is not None:
            self._group.terminate(timeout_s)
            self._group = None

    def pause(self) -> None:
        """Stop it by SIGSTOP: it keeps its connections, and answers nobody.

        Raises:
            PartFailed: it does not run.

        """
        self._running().pause()

    def resume(self) -> None:
        """Let it go on.

        Raises:
            PartFailed: it does not run.

        """
        self._running().resume()

    @property
    def is_alive(self) -> bool:
        """Whether it was started, and has not ended by itself."""
        return self._group is not None and self._group.process.poll() is None

    def failed(self, what: str) -> PartFailed:
        """The error that says so, and which log to read."""
        return PartFailed(f"{self.name} {what}; read {self.log}")

    def _running(self) -> ProcessGroup:
        if self._group is None:
            raise self.failed("does not run")
        return self._group


class FunctionPart(Part):
    """The function under the `functions-framework` command, on one port for ever.

    Args:
        log: its log.
        source: the file with `handle_topup`.
        signature: what functions-framework calls the kind of target.

    """

    def __init__(self, log: Path, *, source: str, signature: str) -> None:
        super().__init__("the function", log)
        self.port = free_port()
        self._source, self._signature = source, signature
        self._env: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where events are posted to."""
        return f"http://{LOOPBACK}:{self.port}/"

    def start(self, env: Mapping[str, str]) -> None:
        """Start it with these settings; on return it answers.

        Raises:
            PartFailed: it does not.

        """
        self._env = dict(env)
        self.restart()

    def restart(self) -> None:
        """Start it again with the same settings, as Kubernetes would.

        Raises:
            PartFailed: it does not answer.

        """
        self.run(self._command(), self._env)
        self.wait_until(self._answers, START_TIMEOUT_S)

    def _command(self) -> list[str | Path]:
        return [
            Path(sys.executable).with_name("functions-framework"),
            *("--source", self._source, "--target", "handle_topup"),
            *("--signature-type", self._signature),
            *("--host", LOOPBACK, "--port", str(self.port)),
        ]

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        # Whatever it says: the naive handler knows no health.
        return True


class PodPart(FunctionPart):
    """The function under gunicorn with function/gunicorn.conf.py, as in its image.

    Args:
        log: its log.
        source: the file with `handle_topup`.
        signature: what functions-framework calls the kind of target.
        name: what it is called in messages.

    """

    def __init__(
        self,
        log: Path,
        *,
        source: str = "function/main.py",
        signature: str = "http",
        name: str = "the function",
    ) -> None:
        super().__init__(log, source=source, signature=signature)
        self.name = name

    def start(self, env: Mapping[str, str]) -> None:
        """Start it with these settings; on return it answers.

        Raises:
            PartFailed: it does not.

        """
        super().start({**env, "PORT": str(self.port)})

    def _command(self) -> list[str | Path]:
        target = f"'handle_topup', '{self._source}', '{self._signature}'"
        return [
            Path(sys.executable).with_name("gunicorn"),
            *("--config", "function/gunicorn.conf.py"),
            *("--bind", f"{LOOPBACK}:{self.port}"),
            f"functions_framework:create_app({target})",
        ]


class SourcePart(Part):
    """A stand-in source in a process of its own, a member of a consumer group.

    Args:
        name: what it is called in messages.
        log: its log.
        kafka: how it connects; contains a password, and is kept in a private file.
        options: of `python -m demo.kafka_source`, beside the connection.

    """

    def __init__(
        self,
        name: str,
        log: Path,
        *,
        kafka: Mapping[str, str | int | bool],
        options: Mapping[str, str | Path],
    ) -> None:
        super().__init__(f"the source {name}", log)
        self._kafka = kafka
        self._options = options

    def start(self) -> None:
        """Start it; it joins the group in its own time."""
        config = self.log.with_suffix(".kafka.json")
        write_private(config, json.dumps(self._kafka))
        command: list[str | Path] = [
            *(sys.executable, "-m", "demo.kafka_source"),
            *("--bootstrap-servers", str(self._kafka["bootstrap.servers"])),
            *("--config", config),
        ]
        for option, value in self._options.items():
            command += [option, value]
        self.run(command, {})


class ResolverPart(Part):
    """The resolver: `topup resolver run`."""

    def __init__(self, log: Path, *, name: str = "the resolver") -> None:
        super().__init__(name, log)

    def start(self, env: Mapping[str, str]) -> None:
        """Start it with the settings of the function beside it."""
        self.run([sys.executable, "-m", "function.cli", "resolver", "run"], env)


class RechargeApiPart(Part):
    """The sandbox recharge API, with its book and its control."""

    def __init__(self, log: Path, *, book: Path) -> None:
        super().__init__("the sandbox recharge API", log)
        self._book = book
        self.port, self._control_port = free_port(), free_port()
        self._port_file = log.with_suffix(".ports")

    @property
    def url(self) -> str:
        """The address of the API."""
        return f"http://{LOOPBACK}:{self.port}"

    def start(
        self,
        kind: str,
        *,
        seed: int = 0,
        fault_rate: float = 0.0,
        faults: Sequence[Fault] = RANDOM_FAULTS,
    ) -> None:
        """Start it as an API of this kind; its book goes on.

        Args:
            kind: what it does with a repeated key.
            seed: of the faults that chance picks.
            fault_rate: the share of recharges that chance spoils, 0 to 1.
            faults: what chance picks from.

        Raises:
            PartFailed: it does not answer.

        """
        self.stop()
        self._port_file.unlink(missing_ok=True)
        command: list[str | Path] = [
            *(sys.executable, "-m", "demo.recharge_api", "--kind", kind),
            *("--book", self._book, "--port-file", self._port_file),
            *("--port", str(self.port), "--control-port", str(self._control_port)),
            *("--seed", str(seed), "--fault-rate", str(fault_rate)),
            *("--faults", ",".join(faults)),
        ]
        self.run(command, {})
        self.wait_until(self._port_file.exists, START_TIMEOUT_S)

    def misbehave(self, script: Script) -> None:
        """Script a fault."""
        self._tell("POST", "/faults", [asdict(script)])

    def spoil_by_chance(self, rate: float) -> None:
        """Spoil this share of recharges from now on, 0 to 1."""
        self._tell("POST", "/chance", {"rate": rate})

    def refuse_connections(self, seconds: float) -> None:
        """Be unreachable from now on; 0 ends it."""
        self._tell("POST", "/outage", {"seconds": seconds})

    def forget_scripts(self) -> None:
        """Play no scripted fault any more; chance goes on."""
        self._tell("DELETE", "/faults")

    def recover(self) -> None:
        """Forget every fault, chance included, and listen again."""
        self.forget_scripts()
        self.spoil_by_chance(0)
        self.refuse_connections(0)

    def _tell(self, method: str, path: str, document: object = None) -> None:
        url = f"http://{LOOPBACK}:{self._control_port}{path}"
        answer = requests.request(method, url, json=document, timeout=10)
        if not answer.ok:
            raise self.failed(f"refused {path}: {answer.text}")
