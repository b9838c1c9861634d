r"""Everything that runs during a soak, and the links between its parts.

Owns the start, the names and the end of every process; must never break anything by
itself: it offers what a nemesis may do, and how it is mended.

    producers -> Kafka --> sources --> functions --> recharge API (its book)
                                 \        |  \
                          a link at each arrow --> MariaDB, primary and replica
                                           |          |
                                       resolvers -----+
"""

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from sqlalchemy import make_url

from certs.make_certs import make_certs
from demo.book import Book
from demo.dead_letter_sink import DeadLetterSink
from demo.faults import Fault
from demo.grounds import TOPIC
from demo.kafka_broker import KafkaServer
from demo.processes import Part, PodPart, RechargeApiPart, ResolverPart, SourcePart
from demo.server_process import LOOPBACK, PROJECT, free_port, write_private
from demo.strimzi_users import SOURCE, read_users
from demo.subject import DEADLINES, GROUP, Database, Function, Naive, Subject
from proof.semi_sync import SemiSyncPair
from proof.tcp_proxy import Link, TcpProxy

PARTITIONS: Final = 16
PODS: Final = ("function-a", "function-b")
RESOLVERS: Final = ("resolver-a", "resolver-b")
SOURCES: Final = ("source-a", "source-b")
#: Who looks into the ledger past every fault, and has patience.
_PERSON: Final = "person"
_PATIENCE_S: Final = 60.0
#: Joins the group, and leaves it.
THIRD_SOURCE: Final = "source-c"

#: Longer than the longest stall and the longest late execution together.
SETTLE_S: Final = 10.0
LEASE_S: Final = float(DEADLINES["RECHARGE_API_DEADLINE_S"]) + float(
    DEADLINES["LEDGER_LEASE_MARGIN_S"]
)
#: The source does not give up; the naive one is tried as often as Knative's default.
_RETRY: Final = 10_000
_RETRY_NAIVE: Final = 10
_SKEWED_CLOCK: Final = PROJECT / "proof" / "skewed_clock"
#: What chance does to a recharge; each leaves the order executable.
CHANCE: Final = (
    Fault.DROP_BEFORE,
    Fault.ERROR_BEFORE,
    Fault.RATE_LIMITED,
    Fault.LATE_EXECUTE,
    Fault.EXECUTE_THEN_DROP,
    Fault.ERROR_AFTER,
    Fault.HALF_BODY,
    Fault.GARBAGE,
)


class Cluster:
    """All parts of a soak; a context manager that starts them, and kills them.

    Args:
        directory: gets every log, the data, the book and the journals.
        kind: what the recharge API does with a repeated key.
        is_naive: the article's own design is on trial instead of the function.
        seed: of the faults that chance picks.
        fault_rate: the share of recharges that chance spoils, 0 to 1.

    """

    def __init__(
        self,
        directory: Path,
        *,
        kind: str,
        is_naive: bool,
        seed: int,
        fault_rate: float,
    ) -> None:
        self.directory = directory
        self.kind = kind
        self.is_naive = is_naive
        self._chance = seed, fault_rate
        #: Held by whoever starts or ends a part.
        self.changes = threading.RLock()
        certificates = make_certs(directory / "certs", force=True)
        self.database = SemiSyncPair(directory / "mariadb", certificates)
        self.broker = KafkaServer(directory / "kafka", certificates)
        self.book = Book(directory / "book.jsonl")
        self.api = RechargeApiPart(directory / "recharge-api.log", book=self.book.path)
        self.proxy = TcpProxy()
        self._dead_letters = DeadLetterSink(
            directory / "dead-letters.jsonl", port=free_port()
        )
        source, signature = ("function/main.py", "http")
        if is_naive:
            source, signature = ("demo/naive.py", "cloudevent")
        self.pods = {
            name: PodPart(
                directory / f"{name}.log", source=source, signature=signature, name=name
            )
            for name in PODS
        }
        self.resolvers = {
            name: ResolverPart(directory / f"{name}.log", name=name)
            for name in RESOLVERS
        }
        self.sources: dict[str, SourcePart] = {}
        self._ledger = Database({}, "")
        #: Names of what must run; the third source only at times.
        self._expected: set[str] = set()
        #: How often a part ended by itself and was started again.
        self.revived = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.proxy)
            stack.enter_context(self._dead_letters)
            stack.enter_context(self.database)
            # Nobody waits for its orderly end.
            stack.callback(self.broker.kill)
            through = self.proxy.link(
                "source->kafka", (LOOPBACK, self.broker.proxied_port)
            )
            self.broker.advertise_through(through.port)
            self.broker.start()
            stack.enter_context(self.api)
            for part in (*self.pods.values(), *self.resolvers.values()):
                stack.enter_context(part)
            self._prepare()
            for name in (*SOURCES, THIRD_SOURCE):
                self.sources[name] = stack.enter_context(self._source(name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start the API, the pods, the resolvers and two sources.

        Raises:
            PartFailed: one of them does not answer.

        """
        seed, fault_rate = self._chance
        self.api.start(self.kind, seed=seed, fault_rate=fault_rate, faults=CHANCE)
        for name in (*PODS, *RESOLVERS, *SOURCES):
            self.start_part(name)

    # -- Parts by name ---------------------------------------------------------------

    def part(self, name: str) -> Part:
        """A pod, a resolver or a source."""
        return {**self.pods, **self.resolvers, **self.sources}[name]

    def start_part(self, name: str, *, clock_skew_s: float = 0.0) -> None:
        """Start a pod, a resolver or a source, and keep it running from now on.

        Args:
            name: which.
            clock_skew_s: of a pod: by how much its wall clock is ahead.

        Raises:
            PartFailed: it does not answer.

        """
        with self.changes:
            if name in self.pods:
                self.pods[name].start(self._env(name, clock_skew_s))
            elif name in self.resolvers:
                # The article knows no resolver.
                if self.is_naive:
                    return
                self.resolvers[name].start(self._env(name))
            else:
                self.sources[name].start()
            self._expected.add(name)

    def end_part(self, name: str, *, is_killed: bool, timeout_s: float = 8.0) -> None:
        """End one by SIGKILL of its whole group, or in order by SIGTERM."""
        with self.changes:
            self._expected.discard(name)
            if is_killed:
                self.part(name).kill()
            else:
                self.part(name).stop(timeout_s)

    def revive(self) -> None:
        """Start again what ended by itself, as Kubernetes would."""
        if not self.changes.acquire(blocking=False):
            return
        try:
            for name in sorted(self._expected):
                if not self.part(name).is_alive:
                    self.start_part(name)
                    self.revived += 1
        finally:
            self.changes.release()

    def mend(self) -> None:
        """Make everything whole: links, API, processes.

        Raises:
            PartFailed: a part does not answer.

        """
        for link in self.proxy.links.values():
            link.heal()
        self.api.recover()
        with self.changes:
            for name in (*PODS, *RESOLVERS, *SOURCES):
                if self.is_naive and name in RESOLVERS:
                    continue
                part = self.part(name)
                if part.is_alive:
                    part.resume()
                else:
                    self.start_part(name)

    # -- The database ------------------------------------------------------------------

    def lead_to_primary(self, port: int) -> None:
        """Lead every link of the database to the server on this port."""
        for name, link in self.proxy.links.items():
            if name.endswith("->database"):
                link.lead_to([(LOOPBACK, port)])

    def subject(self) -> Subject:
        """Who is on trial, with a way to the ledger that no fault disturbs."""
        database = self._database_through(_PERSON)
        return Naive(database) if self.is_naive else Function(database)

    def ledger_env(self) -> dict[str, str]:
        """The settings by which a person reaches the ledger, past every fault."""
        return self._env(_PERSON)

    # -- What there is to see ----------------------------------------------------------

    def journals(self) -> list[Path]:
        """Of all sources."""
        return sorted(self.directory.glob("*.journal.jsonl"))

    def links(self, kind: str) -> list[Link]:
        """The links between two kinds of parts, such as `function->database`."""
        from_, to = kind.split("->")
        return [
            link
            for name, link in self.proxy.links.items()
            if name.startswith(from_) and name.endswith(f"->{to}")
        ]

    # -- Preparation -------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make topic, users, ledger and links."""
        self.broker.create_topic(TOPIC, PARTITIONS)
        for user, acls in read_users().items():
            self.broker.create_user(user, acls)
        self._ledger = self._database()
        for name in (*PODS, *RESOLVERS, _PERSON):
            self.proxy.link(f"{name}->database", (LOOPBACK, self.database.port))
            self.proxy.link(f"{name}->api", (LOOPBACK, self.api.port))
        targets = [(LOOPBACK, pod.port) for pod in self.pods.values()]
        for name in (*SOURCES, THIRD_SOURCE):
            self.proxy.link(f"{name}->function", *targets)
        self.subject().prepare()

    def _database(self) -> Database:
        url = make_url(self.database.create_database("ledger"))
        password_file = self.directory / "ledger-password"
        write_private(password_file, str(url.password))
        env = {
            "LEDGER_DATABASE_URL": url.set(password=None).render_as_string(),
            "LEDGER_PASSWORD_FILE": str(password_file),
            "LEDGER_TLS_CA_FILE": str(self.database.ca),
        }
        return Database(env, url.render_as_string(hide_password=False))

    def _database_through(self, name: str) -> Database:
        """The ledger as one part sees it: at its own link's port."""
        port = self.proxy.links[f"{name}->database"].port

        def through(text: str) -> str:
            url = make_url(text).set(port=port)
            return url.render_as_string(hide_password=False)

        env = dict(self._ledger.env)
        env["LEDGER_DATABASE_URL"] = through(env["LEDGER_DATABASE_URL"])
        env["RECHARGE_API_SETTLE_S"] = str(SETTLE_S)
        if name == _PERSON:
            env["LEDGER_TIMEOUT_S"] = str(_PATIENCE_S)
        return Database(env, through(self._ledger.url))

    def _env(self, name: str, clock_skew_s: float = 0.0) -> dict[str, str]:
        """The settings of one part, which sees the others through its own links."""
        database = self._database_through(name)
        subject = Naive(database) if self.is_naive else Function(database)
        port = self.proxy.links[f"{name}->api"].port
        env = subject.env(f"http://{LOOPBACK}:{port}", self.kind)
        if clock_skew_s:
            env["CLOCK_SKEW_S"] = str(clock_skew_s)
            env["PYTHONPATH"] = f"{_SKEWED_CLOCK}:{PROJECT}"
        return env

    def _source(self, name: str) -> SourcePart:
        retry = _RETRY_NAIVE if self.is_naive else _RETRY
        kafka = self.kafka_config(SOURCE) | {
            "bootstrap.servers": f"localhost:{self.proxy.links['source->kafka'].port}",
            "session.timeout.ms": 3000,
            "heartbeat.interval.ms": 500,
        }
        return SourcePart(
            name,
            self.directory / f"{name}.log",
            kafka=kafka,
            options={
                "--topic": TOPIC,
                "--group": GROUP,
                "--sink": f"http://{LOOPBACK}:{self.proxy.links[f'{name}->function'].port}/",
                "--dead-letter-sink": self._dead_letters.url,
                "--retry": str(retry),
                "--backoff-policy": "linear",
                "--backoff-delay": "PT0.2S",
                "--timeout": f"PT{float(DEADLINES['EVENT_DELIVERY_TIMEOUT_S'])}S",
                "--extension": f"topic={TOPIC}",
                "--journal": self.directory / f"{name}.journal.jsonl",
            },
        )

    def kafka_config(self, user: str) -> dict[str, str | int | bool]:
        """How a user connects to the broker; contains a password."""
        settings = self.broker.client_config(user)
        kept = {k: v for k, v in settings.items() if not isinstance(v, float)}
        # Librdkafka writes to standard error; of a broker that is down we know.
        return {**kept, "log_level": 2}
