"""The image, really built and really run, as restricted as a pod can be.

A base is made on the machine, since one can't be pulled everywhere; what is above it is
the Dockerfile's. The ledger is a MariaDB over TLS, and the judge the recharge API's
book. What is measured goes to build/image/report.json.
"""

import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import sqlalchemy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from demo.faults import Fault, Script
from demo.mariadb import MariaDb
from demo.recharge_api import Kind, SandboxRechargeApi
from tests.containers import Container, Podman
from tests.orders import data, headers
from tests.processes import DEADLINE_S, ROOT, free_port, function_env
from tests.servers import require

# The first one waits for the build: under a minute on a machine of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IMAGE: Final = "localhost/topup-function:under-test"
STORE: Final = ROOT / "build" / "image"
REPORT: Final = STORE / "report.json"
SETTINGS: Final = {"event_redelivery_max_s": 3, "resolver_interval_s": 0.1}
GRACE_S: Final = 10
STARTS: Final = 3
EVENTS: Final = 100


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    with require(lambda: Podman(STORE)) as started:
        yield started


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The name of the image, built as `make image BASE=local` builds it."""
    options = ["--tool", "podman", "--base", "local", "--tag", IMAGE]
    built = subprocess.run(
        [sys.executable, "-m", "demo.image", *options],
        cwd=ROOT,
        env={**os.environ, **podman.env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return IMAGE


@dataclass(frozen=True)
class System:
    """The image with a ledger, which it migrated itself, and a recharge API."""

    podman: Podman
    image: str
    api: SandboxRechargeApi
    env: Mapping[str, str]
    secrets: Path

    def run(self, *command: str, **settings: object) -> Container:
        """Start the image with its settings, and with `settings` instead of some."""
        env = {name.upper(): str(value) for name, value in settings.items()}
        given = {**self.env, **env}
        return self.podman.run(self.image, command, env=given, secrets=self.secrets)

    def topup(self, *words: str) -> Any:
        """What a command prints as JSON."""
        with self.run("topup", *words, "--json") as command:
            assert command.wait() == 0, command.log()
            return json.loads(command.log())

    @contextmanager
    def function(self, **settings: object) -> Iterator["Function"]:
        """The function, ready."""
        port = free_port()
        with self.run(port=port, **settings) as container:
            function = Function(container, f"http://127.0.0.1:{port}/")
            container.wait_until(lambda: function.probe("readyz") == 200)
            yield function


@dataclass(frozen=True)
class Function:
    """A container that serves, and where."""

    container: Container
    url: str

    def probe(self, path: str) -> int:
        """The status of a probe; 0 while nobody listens."""
        try:
            return requests.get(self.url + path, timeout=DEADLINE_S).status_code
        except requests.ConnectionError:
            return 0

    def post(self, name: str, msisdn: str, offset: int) -> requests.Response:
        """Deliver an order as KafkaSource does."""
        return requests.post(
            self.url,
            json=data(name, msisdn=msisdn),
            headers=headers(offset=offset),
            timeout=60,
        )


@pytest.fixture(scope="session")
def system(
    podman: Podman,
    image: str,
    mariadb: MariaDb,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[System]:
    secrets = tmp_path_factory.mktemp("secrets")
    # The folder and the files are the container's user's to read, as a Secret's are.
    secrets.chmod(0o755)
    url = sqlalchemy.make_url(mariadb.create_database("image"))
    (secrets / "password").write_text(url.password or "")
    (secrets / "ca.crt").write_bytes(mariadb.ca.read_bytes())
    book = tmp_path_factory.mktemp("book") / "book.jsonl"
    with SandboxRechargeApi(kind=Kind.LOOKUP, book=book) as api:
        without_password = url.set(password=None).render_as_string()
        env = function_env(
            without_password, api.url, recharge_api_kind="lookup", **SETTINGS
        )
        env["LEDGER_PASSWORD_FILE"] = "/secrets/password"
        env["LEDGER_TLS_CA_FILE"] = "/secrets/ca.crt"
        made = System(podman, image, api, env, secrets)
        with made.run("topup", "migrate") as job:
            assert job.wait() == 0, job.log()
            assert "ledger at revision" in job.log()
        yield made


@pytest.fixture(scope="session")
def function(system: System) -> Iterator[Function]:
    with system.function() as started:
        yield started


def executions(system: System, *names: str) -> list[str]:
    """Which of these orders the API executed, in the order in which it did."""
    done = [entry.key for entry in system.api.book.executions()]
    return [key.removeprefix("app:") for key in done if key[4:] in names]


def calls(system: System, name: str) -> int:
    return sum(call.key == f"app:{name}" for call in system.api.book.calls())


# ---- what it does -------------------------------------------------------------------


def test_event_is_executed_once_and_its_repetition_answered(
    system: System, function: Function
) -> None:
    answers = [function.post("once", "+41790000001", 1) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["reference"] == answers[1].json()["reference"]
    assert executions(system, "once") == ["once"]
    assert calls(system, "once") == 1


def test_probes_are_answered(function: Function) -> None:
    assert function.probe("healthz") == 200
    assert function.probe("readyz") == 200


def test_running_call_is_settled_and_no_other_begins_after_sigterm(
    system: System,
) -> None:
    """One thread, so that the second delivery is queued behind the first."""
    slow = Script(Fault.EXECUTE_THEN_LATE, key="app:running", delay_s=1.5)
    system.api.add_faults(slow)
    with system.function(server_threads=1) as function, ThreadPoolExecutor(2) as pool:
        running = pool.submit(function.post, "running", "+41790000002", 2)
        function.container.wait_until(lambda: calls(system, "running"))
        queued = pool.submit(function.post, "queued", "+41790000003", 3)
        function.container.signal("TERM")

        assert running.result().status_code == 200
        # Refused, or never taken from the queue of connections.
        with suppress(requests.ConnectionError):
            assert queued.result().status_code == 503
        assert function.container.wait() == 0

    assert executions(system, "running", "queued") == ["running"]
    assert calls(system, "queued") == 0


def test_kubelet_s_stop_is_heeded_within_the_grace_period(system: System) -> None:
    """The image's own stop signal, and no shell in between that keeps it."""
    with system.function() as function:
        assert function.container.stop(GRACE_S) == 0


def test_resolver_settles_what_a_killed_function_left_and_what_waited(
    system: System, function: Function
) -> None:
    msisdn = "+41790000004"
    late = Script(Fault.EXECUTE_THEN_LATE, key="app:doubtful", delay_s=2.5)
    system.api.add_faults(late)
    with system.function() as doomed, ThreadPoolExecutor(1) as pool:
        lost = pool.submit(doomed.post, "doubtful", msisdn, 4)
        doomed.container.wait_until(lambda: calls(system, "doubtful"))
        doomed.container.signal("KILL")
        with pytest.raises(requests.ConnectionError):
            lost.result()
    assert function.post("behind", msisdn, 5).status_code in {409, 424}
    assert executions(system, "doubtful", "behind") == ["doubtful"]

    with system.run("topup", "resolver", "run") as resolver:
        resolver.wait_until(lambda: executions(system, "behind"))
        assert resolver.stop(GRACE_S) == 0

    assert executions(system, "doubtful", "behind") == ["doubtful", "behind"]
    for name in ("doubtful", "behind"):
        shown = system.topup("ledger", "show", f"app:{name}")
        assert shown["order"]["status"] == "succeeded"


def test_operators_see_the_ledger(system: System, function: Function) -> None:
    assert function.post("counted", "+41790000006", 6).status_code == 200

    statuses = system.topup("ledger", "stats")["statuses"]

    assert "succeeded" in {row["name"] for row in statuses}


@pytest.mark.parametrize("command", [(), ("topup", "migrate")])
def test_bad_setting_refuses_to_start_and_is_named_in_one_line(
    system: System, command: tuple[str, ...]
) -> None:
    with system.run(*command, recharge_api_kind="maybe") as container:
        assert container.wait() == 1
        (line,) = container.log().splitlines()

    assert "RECHARGE_API_KIND" in line


# ---- how it is restricted -----------------------------------------------------------


def test_every_process_is_without_root_and_without_any_capability(
    function: Function,
) -> None:
    pids = function.container.pids()
    assert len(pids) == 2, "gunicorn and its one worker"

    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert set(status["Uid"].split() + status["Gid"].split()) == {"65532"}
        for kind in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
            assert int(status[kind], 16) == 0
        assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("folder", ["/", "/app", "/tmp", "/opt/topup", "/var/tmp"])  # noqa: S108
def test_nothing_can_be_written(function: Function, folder: str) -> None:
    tried = function.container.execute("touch", f"{folder}/x")

    assert tried.returncode == 1
    assert "Read-only file system" in tried.stderr


def test_killed_test_run_leaves_no_container(podman: Podman, image: str) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from tests.containers import Podman
with Podman(Path(sys.argv[1])) as podman:
    container = podman.run(sys.argv[2], ["sleep", "1000"])
    print(container.id, container.state()["Running"], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, STORE, image],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    container_id, is_running = killed.stdout.split()
    assert is_running == "True"

    end = time.monotonic() + DEADLINE_S
    while podman.call("container", "exists", container_id).returncode == 0:
        assert time.monotonic() < end, "it outlives who started it"
        time.sleep(0.05)


# ---- what it holds ------------------------------------------------------------------

TOOLS: Final = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|cpp|ld|as|make|cargo|git)(-\d+)?")


@pytest.fixture(scope="session")
def files(podman: Podman, image: str) -> Iterator[Path]:
    with podman.files(image) as root:
        yield root


def test_image_holds_the_function_s_files_and_no_others(files: Path) -> None:
    def tree(root: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }

    assert tree(files / "app") == {
        f"function/{name}": content for name, content in tree(ROOT / "function").items()
    }


def test_image_holds_exactly_what_is_locked(files: Path) -> None:
    """No pip, no Kubernetes client, nothing of the tests."""
    lock = re.findall(
        r"^([\w.-]+==\S+)(?: ; (.*?))? \\$",
        (ROOT / "requirements.lock").read_text("utf-8"),
        re.MULTILINE,
    )
    locked = [Requirement("; ".join(filter(None, pair))) for pair in lock]
    (folder,) = (files / "opt" / "topup" / "lib").glob("python3.*/site-packages")

    found = importlib.metadata.distributions(path=[str(folder)])

    assert {(canonicalize_name(each.name), each.version) for each in found} == {
        (canonicalize_name(each.name), str(each.specifier).removeprefix("=="))
        for each in locked
        if each.marker is None or each.marker.evaluate()
    }


def test_image_holds_no_tool_to_build_and_no_cache(files: Path) -> None:
    paths = list(files.rglob("*"))
    programs = {path.name for path in paths if path.parent.name in {"bin", "sbin"}}

    assert "python3" in programs
    assert [name for name in sorted(programs) if TOOLS.fullmatch(name)] == []
    assert [path for path in paths if path.suffix in {".whl", ".deb"}] == [
        path for path in paths if path.parent.name == "python-wheels"
    ]
    for folder in ("root/.cache", "build", "wheels", "opt/pip"):
        assert not (files / folder).exists()
    assert {".git", ".cache", "http-v2"} & {path.name for path in paths} == set()


def test_every_module_is_compiled(files: Path) -> None:
    sources = [
        path
        for folder in ("app", "opt/topup/lib")
        for path in (files / folder).rglob("*.py")
    ]
    assert len(sources) > 1000

    bare = [
        path
        for path in sources
        if not list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
    ]

    assert [path.name for path in bare] == []


def test_everybody_reads_what_runs_and_nobody_but_root_writes_it(files: Path) -> None:
    for folder in ("app", "opt/topup"):
        for path in [files / folder, *(files / folder).rglob("*")]:
            status = path.lstat()
            assert (status.st_uid, status.st_gid) == (0, 0)
            assert path.is_symlink() or status.st_mode & 0o066 == 0o044


def test_labels_say_what_it_is(podman: Podman, image: str) -> None:
    (found,) = json.loads(podman.words("image", "inspect", image))

    labels = found["Labels"]
    version = importlib.metadata.version("topup-function")
    assert labels["org.opencontainers.image.title"] == "topup-function"
    assert labels["org.opencontainers.image.version"] == version
    assert "org.opencontainers.image.revision" in labels
    assert found["Config"]["User"] == "65532:65532"


# ---- what it takes ------------------------------------------------------------------


def started_s(pid: int) -> float:
    """When a process began, in seconds since the machine's start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def start_s(system: System) -> float:
    """How long a container takes to be ready; the engine's own time is not in it."""
    with system.function() as function:
        ready_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return ready_s - started_s(function.container.pids()[0])


def memory(container: Container) -> dict[str, int]:
    """Of all its processes, in bytes; what they share counts once in `pss`."""
    total = {"rss_bytes": 0, "pss_bytes": 0}
    for pid in container.pids():
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        for name in ("Rss", "Pss"):
            kib = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
            assert kib
            total[f"{name.lower()}_bytes"] += int(kib[1]) * 1024
    return total


def test_what_it_takes_is_reported(system: System) -> None:
    """Measured, not judged: another machine is another number."""
    starts = [start_s(system) for _ in range(STARTS)]
    with system.function() as function:
        at_start = memory(function.container)
        for number in range(EVENTS):
            msisdn = f"+4179111{number:04}"
            answer = function.post(f"event-{number}", msisdn, 100 + number)
            assert answer.status_code == 200
        after = memory(function.container)
    sizes = {
        name: int(system.podman.words("image", "inspect", "--format={{.Size}}", each))
        for name, each in (
            ("image_bytes", IMAGE),
            ("base_bytes", "localhost/topup-python:3.11-bookworm"),
        )
    }

    report = {
        **sizes,
        # From the birth of the container's first process to a probe's first 200.
        "start_s": statistics.median(starts),
        "memory_at_start": at_start,
        f"memory_after_{EVENTS}_events": after,
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n", "utf-8")

    assert executions(system, "event-0", "event-99") == ["event-0", "event-99"]
    assert sizes["base_bytes"] < sizes["image_bytes"]
