"""Podman with a store of its own, for tests that run the image as a cluster would.

Owns how a container is restricted, started, watched and ended. Nothing outlives the
test run, not even a killed one: a guard removes what was started. Must never touch the
machine's own containers and images.
"""

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from demo.server_process import ServiceMissing
from demo.services import require_image_programs
from tests.processes import DEADLINE_S

#: As a pod that allows nothing: the root can't be written, not even /tmp, and the
#: image's own user has no capability and gets none. Its network is the machine's, where
#: the ledger and the recharge API listen on 127.0.0.1.
RESTRICTED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all"),
    *("--security-opt=no-new-privileges", "--network=host"),
)
_STORAGE: Final = """\
[storage]
driver = "overlay"
graphroot = "{store}/graph"
runroot = "{store}/run"
[storage.options.overlay]
# Else the store stays mounted on itself.
skip_mount_home = "true"
"""
_CONTAINERS: Final = """\
[containers]
# Within what any machine allows: a root that is itself in a container can't raise them.
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
# Neither systemd nor its journal is needed.
cgroup_manager = "cgroupfs"
events_logger = "none"
static_dir = "{store}/graph/libpod"
volume_path = "{store}/graph/volumes"
tmp_dir = "{store}/run/libpod"
"""


class Podman:
    """Podman over a store in a folder; a context manager that leaves no container.

    Images stay in the store, as a cache for the next run.

    Raises ServiceMissing where podman is not installed, or we are not root.
    """

    def __init__(self, store: Path) -> None:
        require_image_programs()
        if os.geteuid():
            raise ServiceMissing("the image's tests take root, to restrict containers")
        store.mkdir(parents=True, exist_ok=True)
        #: What makes any podman use this store, also one that demo/image.py starts.
        self.env = {name: os.environ[name] for name in ("PATH", "HOME")} | {
            "CONTAINERS_STORAGE_CONF": str(store / "storage.conf"),
            "CONTAINERS_CONF": str(store / "containers.conf"),
        }
        (store / "storage.conf").write_text(_STORAGE.format(store=store))
        (store / "containers.conf").write_text(_CONTAINERS.format(store=store))
        # Another run may share the store.
        self._label = f"run={uuid.uuid4()}"

    def __enter__(self) -> Self:
        # It reads until this process closes the pipe, or is dead.
        mine = f"$(podman ps -aq --filter label={self._label})"
        remove = f"read -r parent_is_gone; podman rm --force --time 0 {mine}"
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", remove],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.env,
            process_group=0,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.communicate()
        assert self.words("ps", "-aq", "--filter", f"label={self._label}") == ""

    def call(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run podman to its end, whatever its status."""
        return subprocess.run(
            ["podman", *words],
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def words(self, *words: str | Path) -> str:
        """What podman prints when it succeeds, which it must."""
        done = self.call(*words)
        assert done.returncode == 0, f"podman {words[0]}: {done.stderr}"
        return done.stdout.strip()

    def run(
        self,
        image: str,
        command: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        secrets: Path | None = None,
    ) -> "Container":
        """Start a restricted container, and don't wait for anything.

        Args:
            image: its name.
            command: instead of the image's own, the function.
            env: added to the image's own environment.
            secrets: a folder that it sees as /secrets, to be read only.

        """
        given = [f"--env={name}={value}" for name, value in (env or {}).items()]
        if secrets is not None:
            given.append(f"--volume={secrets}:/secrets:ro")
        label = f"--label={self._label}"
        options = ["--detach", label, *RESTRICTED, *given]
        return Container(self, self.words("run", *options, image, *command))

    @contextlib.contextmanager
    def files(self, image: str) -> Iterator[Path]:
        """The image's root, to be looked at."""
        root = Path(self.words("image", "mount", image))
        try:
            yield root
        finally:
            self.words("image", "unmount", image)


class Container:
    """A started container."""

    def __init__(self, podman: Podman, container_id: str) -> None:
        self._podman = podman
        #: As podman names it.
        self.id = container_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """End it by SIGKILL, if it still runs, and remove it."""
        self._podman.words("rm", "--force", "--time", "0", self.id)

    def state(self) -> dict[str, object]:
        """Podman's word about it, as `Running`, `Pid`, `ExitCode`."""
        end = time.monotonic() + DEADLINE_S
        while True:
            done = self._podman.call("inspect", "--format", "{{json .State}}", self.id)
            if done.returncode == 0:
                found: dict[str, object] = json.loads(done.stdout)
                return found
            # Its process ended while podman was looking at it: the next look sees that.
            assert "no such process" in done.stderr, f"podman inspect: {done.stderr}"
            assert time.monotonic() < end, f"podman inspect: {done.stderr}"

    def pids(self) -> list[int]:
        """Its processes by their numbers on the machine, the first one first."""
        return [
            int(line)
            for line in self._podman.words("top", self.id, "hpid").splitlines()[1:]
        ]

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as its own user."""
        return self._podman.call("exec", self.id, *command)

    def signal(self, name: str) -> None:
        """Signal its first process, as the kubelet does, and don't wait."""
        self._podman.words("kill", "--signal", name, self.id)

    def stop(self, grace_s: int) -> int:
        """End it as the kubelet does; the exit status, 137 if the grace ran out."""
        self._podman.words("stop", "--time", str(grace_s), self.id)
        return self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself, and return its exit status."""
        self.wait_until(lambda: not self.state()["Running"])
        return int(str(self.state()["ExitCode"]))

    def log(self) -> str:
        """What it wrote to standard output and error."""
        done = self._podman.call("logs", self.id)
        return done.stdout + done.stderr

    def wait_until(
        self, is_so: Callable[[], object], timeout_s: float = DEADLINE_S
    ) -> None:
        """Wait for a condition; the container's log tells why it doesn't come."""
        end = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < end, f"waited in vain; its log:\n{self.log()}"
            time.sleep(0.02)
