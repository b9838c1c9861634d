"""Apache Kafka for the demo and the tests: a private broker, or one that is given.

Owns its jars, its start, its users with their rights, and how clients connect. It
listens on 127.0.0.1 only, demands TLS 1.3 and a password or a certificate, and allows
what an ACL allows.
Must never print a password, or be used for real orders.
"""

import dataclasses
import fcntl
import hashlib
import itertools
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from certs.make_certs import Certificates
from demo.server_process import (
    LOOPBACK,
    POLL_S,
    PROJECT,
    Server,
    ServerError,
    ServiceMissing,
    free_port,
    given_file,
    output,
    run,
    write_private,
)

POM = Path(__file__).resolve().parent / "kafka" / "pom.xml"
LOG4J = POM.with_name("log4j2.properties")
JAVA_VERSION_MIN = 17
OR_NAME_A_BROKER = "or name a running broker in KAFKA_BOOTSTRAP_SERVERS"
#: An answer of a broker on this machine that takes longer is a fault.
ADMIN_TIMEOUT_S = 30.0
#: What a user's password costs to check; Kafka's least and its default.
SCRAM_ITERATIONS = 4096
ADMIN = "admin"

#: How a client of confluent_kafka connects.
Config = dict[str, str | int | float | bool]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Acl:
    """One right: an operation on a resource of exactly this name."""

    resource: ResourceType
    name: str
    operation: AclOperation


class KafkaCluster:
    """A Kafka cluster as its clients see it, ours or a found one.

    Configurations are dictionaries for confluent_kafka and contain passwords.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        *,
        ca: Path,
        admin: str,
        admin_password: str,
        protocol: str = "SASL_SSL",
        mechanism: str = "SCRAM-SHA-512",
        partitions_default: int = 4,
    ) -> None:
        self.bootstrap_servers = bootstrap_servers
        #: Certificate of the CA that signed the broker's.
        self.ca = ca
        self.partitions_default = partitions_default
        self._admin = admin
        self._protocol = protocol
        self._mechanism = mechanism
        self._passwords = {admin: admin_password}

    def admin_config(self) -> Config:
        """How the administrator connects."""
        return self.client_config(self._admin)

    def client_config(self, user: str) -> Config:
        """How a user connects who was made by `create_user`; KeyError for others."""
        return {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self._protocol,
            "sasl.mechanism": self._mechanism,
            "sasl.username": user,
            "sasl.password": self._passwords[user],
            "ssl.ca.location": str(self.ca),
        }

    def create_topic(self, name: str, partitions: int | None = None) -> None:
        """Make a topic; every partition has its leader when this returns.

        Raises KafkaException where the topic exists, ServerError when it takes longer
        than ADMIN_TIMEOUT_S.
        """
        count = partitions or self.partitions_default
        admin = self._admin_client()
        admin.create_topics([NewTopic(name, num_partitions=count)])[name].result(
            ADMIN_TIMEOUT_S
        )

        def is_led() -> bool:
            topic = admin.list_topics(name, ADMIN_TIMEOUT_S).topics[name]
            leaders = [partition.leader for partition in topic.partitions.values()]
            return len(leaders) == count and min(leaders) >= 0

        _wait_until(is_led, f"topic {name} has no leaders")

    def create_user(self, name: str, acls: Iterable[Acl] = ()) -> None:
        """Make a user with a random password and these rights, and no others.

        The broker knows both when this returns. An existing user gets a new password.
        """
        admin = self._admin_client()
        password = secrets.token_urlsafe(24)
        credential = UserScramCredentialUpsertion(
            name,
            ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS),
            password.encode(),
        )
        admin.alter_user_scram_credentials([credential])[name].result(ADMIN_TIMEOUT_S)
        self._passwords[name] = password
        self.grant(name, acls)
        _wait_until(lambda: self._lets_in(name), f"{name} is not let in")

    def grant(self, user: str, acls: Iterable[Acl]) -> None:
        """Give a user these rights, by password and by certificate alike.

        The broker knows them when this returns.
        """
        wanted = _bindings(user, acls)
        if not wanted:
            return
        admin = self._admin_client()
        for future in admin.create_acls(list(wanted)).values():
            future.result(ADMIN_TIMEOUT_S)
        _wait_until(
            lambda: wanted <= _rights(admin, user),
            f"the rights of {user} do not arrive",
        )

    def revoke(self, user: str, acl: Acl) -> None:
        """Take a right away; the broker has forgotten it when this returns."""
        unwanted = _bindings(user, [acl])
        admin = self._admin_client()
        for future in admin.delete_acls([_filter(each) for each in unwanted]).values():
            future.result(ADMIN_TIMEOUT_S)
        _wait_until(
            lambda: not unwanted & _rights(admin, user),
            f"the rights of {user} do not go",
        )

    def _lets_in(self, user: str) -> bool:
        return _lists_brokers(self.client_config(user), timeout_s=2)

    def _admin_client(self) -> AdminClient:
        return AdminClient(self.admin_config(), logger=_logger)


def _principals(user: str) -> tuple[str, str]:
    """Who a user is by password, and by certificate: as with Strimzi, its subject."""
    return f"User:{user}", f"User:CN={user}"


def _bindings(user: str, acls: Iterable[Acl]) -> set[AclBinding]:
    return {
        AclBinding(
            acl.resource,
            acl.name,
            ResourcePatternType.LITERAL,
            principal,
            "*",
            acl.operation,
            AclPermissionType.ALLOW,
        )
        for acl in acls
        for principal in _principals(user)
    }


def _filter(binding: AclBinding) -> AclBindingFilter:
    return AclBindingFilter(
        binding.restype,
        binding.name,
        binding.resource_pattern_type,
        binding.principal,
        binding.host,
        binding.operation,
        binding.permission_type,
    )


def _rights(admin: AdminClient, user: str) -> set[AclBinding]:
    """Every ACL of a user, however it logs in."""
    rights: set[AclBinding] = set()
    for principal in _principals(user):
        every = AclBindingFilter(
            ResourceType.ANY,
            None,  # type: ignore[arg-type] # None is any name, any host.
            ResourcePatternType.ANY,
            principal,
            None,  # type: ignore[arg-type]
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        rights.update(admin.describe_acls(every).result(ADMIN_TIMEOUT_S))
    return rights


def _lists_brokers(config: Config, timeout_s: float) -> bool:
    """Whether a client with this configuration gets the cluster's metadata."""
    client = AdminClient(config, logger=_logger)
    try:
        return bool(client.list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False


def _wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + ADMIN_TIMEOUT_S
    while not is_so():
        if time.monotonic() > deadline:
            raise ServerError(f"{otherwise} after {ADMIN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)


@dataclasses.dataclass(frozen=True)
class Listener:
    """A port of the broker: who may come in, and how they prove it."""

    name: str
    port: int
    protocol: str
    #: Written with `listener.name.<name>.` before each.
    settings: Mapping[str, str]
    #: The controller's is for the broker alone, and so is not told to clients.
    is_advertised: bool = True
    #: Where clients are told to connect, if that is elsewhere: at a proxy.
    advertised_port: int = 0


class KafkaServer(Server, KafkaCluster):
    """A private Kafka: one node that is broker and controller, with TLS 1.3.

    A user logs in with SCRAM at one listener, or with a certificate at another, as with
    Strimzi. Nobody may do anything that no ACL allows, except the administrator. Topics
    aren't made by themselves. The certificates must be valid for localhost, the name
    that is advertised.
    """

    name = "kafka"

    def __init__(
        self,
        directory: Path,
        certificates: Certificates,
        *,
        partitions_default: int = 4,
    ) -> None:
        Server.__init__(self, directory)
        self._port, self._controller_port = free_port(), free_port()
        self._certificate_port = free_port()
        #: Where a proxy finds the broker; nobody listens unless `advertise_through`.
        self.proxied_port = free_port()
        self._proxy_port = 0
        self._admin_password = secrets.token_urlsafe(24)
        KafkaCluster.__init__(
            self,
            f"localhost:{self._port}",
            ca=certificates.ca,
            admin=ADMIN,
            admin_password=self._admin_password,
            partitions_default=partitions_default,
        )
        self._certificates = certificates

    def advertise_through(self, port: int) -> None:
        """From the next start on, have one more way in: through a proxy's port.

        Whoever bootstraps there stays there: a broker tells each client where to go.
        """
        self._proxy_port = port

    def client_config(self, user: str) -> Config:
        """How a user connects who was made by `create_user`; KeyError for others."""
        return {**super().client_config(user), **_NEAR}

    def certificate_config(self, name: str) -> Config:
        """How a client connects that has no password but a certificate of ours.

        KeyError for a name that no client certificate was made for.
        """
        certificate, key = self._certificates.clients[name]
        return {
            "bootstrap.servers": f"localhost:{self._certificate_port}",
            "security.protocol": "SSL",
            "ssl.ca.location": str(self.ca),
            "ssl.certificate.location": str(certificate),
            "ssl.key.location": str(key),
            **_NEAR,
        }

    def _listeners(self) -> tuple[Listener, ...]:
        scram = {
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            # What the broker itself logs in with, where it is its own client.
            "scram-sha-512.sasl.jaas.config": _jaas(
                "scram.ScramLoginModule", self._admin_password
            ),
        }
        proxied = Listener(
            "PROXIED",
            self.proxied_port,
            "SASL_SSL",
            scram,
            advertised_port=self._proxy_port,
        )
        return (
            Listener("CLIENT", self._port, "SASL_SSL", scram),
            *([proxied] if self._proxy_port else []),
            Listener(
                "MTLS",
                self._certificate_port,
                "SSL",
                {"ssl.client.auth": "required"},
            ),
            # The controller can't use SCRAM, whose credentials it would have to know
            # before it has read them. PLAIN over TLS knows its one user, the
            # administrator, from this very file; so nothing of ours is plaintext, and
            # no unknown local user is taken for the broker.
            Listener(
                "CONTROLLER",
                self._controller_port,
                "SASL_SSL",
                {
                    "sasl.enabled.mechanisms": "PLAIN",
                    "plain.sasl.jaas.config": _jaas(
                        "plain.PlainLoginModule",
                        self._admin_password,
                        f'user_{ADMIN}="{self._admin_password}"',
                    ),
                },
                is_advertised=False,
            ),
        )

    def _properties(self) -> dict[str, str]:
        listeners = self._listeners()
        properties = {
            "listeners": ",".join(f"{x.name}://{LOOPBACK}:{x.port}" for x in listeners),
            "advertised.listeners": ",".join(
                f"{x.name}://localhost:{x.advertised_port or x.port}"
                for x in listeners
                if x.is_advertised
            ),
            "listener.security.protocol.map": ",".join(
                f"{x.name}:{x.protocol}" for x in listeners
            ),
            "controller.quorum.voters": f"1@localhost:{self._controller_port}",
            "num.partitions": str(self.partitions_default),
        }
        for listener in listeners:
            prefix = f"listener.name.{listener.name.lower()}."
            properties |= {prefix + k: v for k, v in listener.settings.items()}
        return properties | _PROPERTIES

    def _prepare(self) -> None:
        # Paths in the file are relative: Java would read a non-ASCII folder wrong.
        write_private(
            self.directory / "server.properties",
            "".join(f"{k}={v}\n" for k, v in self._properties().items()),
        )
        write_private(
            self.directory / "keystore.pem",
            self._certificates.server_key.read_text()
            + self._certificates.server_cert.read_text(),
        )
        shutil.copyfile(self.ca, self.directory / "truststore.pem")
        # In a file, because every user of the machine can read a command line.
        arguments = self.directory / "format.args"
        credential = f"SCRAM-SHA-512=[name={ADMIN},password={self._admin_password}]"
        options = {
            "--config": "server.properties",
            # Never one that begins with a dash.
            "--cluster-id": secrets.token_hex(11),
            "--add-scram": credential,
        }
        lines = ["format", *itertools.chain.from_iterable(options.items())]
        write_private(arguments, "\n".join(lines))
        try:
            tool = ["kafka.tools.StorageTool", f"@{arguments.name}"]
            run([*_java(), *tool], log=self.log, cwd=self.directory)
        finally:
            arguments.unlink()

    def _command(self) -> list[str | Path]:
        return [*_java(), "kafka.Kafka", "server.properties"]

    def _answers(self) -> bool:
        # Cheaper than a client, and a client would log each refusal.
        try:
            socket.create_connection((LOOPBACK, self._port), timeout=1).close()
        except OSError:
            return False
        return _lists_brokers(self.admin_config(), timeout_s=2)


#: We listen on 127.0.0.1 only, and localhost may mean ::1 first. And a test that
#: restarts the broker need not wait for the usual ten seconds.
_NEAR: Config = {"broker.address.family": "v4", "reconnect.backoff.max.ms": "500"}

_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "log.dirs": "data",
    "inter.broker.listener.name": "CLIENT",
    "controller.listener.names": "CONTROLLER",
    "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
    "sasl.mechanism.controller.protocol": "PLAIN",
    "ssl.keystore.type": "PEM",
    "ssl.keystore.location": "keystore.pem",
    "ssl.truststore.type": "PEM",
    "ssl.truststore.location": "truststore.pem",
    "ssl.enabled.protocols": "TLSv1.3",
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "false",
    "super.users": f"User:{ADMIN}",
    "auto.create.topics.enable": "false",
    # There is one node: nothing can be replicated.
    "default.replication.factor": "1",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # Each partition of these costs files and time at every start, for a few groups.
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # A group starts at once, and a killed consumer is given up within seconds.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # A killed broker comes back only when its former life's session has ended.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # The default for its buffer is a quarter of our heap.
    "log.cleaner.dedupe.buffer.size": "4194304",
    "log.cleaner.io.buffer.size": "65536",
    "num.network.threads": "2",
    "num.io.threads": "4",
}


def _jaas(module: str, password: str, *more: str) -> str:
    options = [f'username="{ADMIN}"', f'password="{password}"', *more]
    prefix = "org.apache.kafka.common.security"
    return f"{prefix}.{module} required {' '.join(options)};"


def _java() -> list[str | Path]:
    """The beginning of a command that runs one of Kafka's classes."""
    return [
        find_java(),
        "-Xmx512m",
        # One small heap on few cores: the least threads, the fastest start.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Djava.awt.headless=true",
        f"-Dlog4j2.configurationFile={LOG4J.as_uri()}",
        "-classpath",
        f"{fetch_kafka()}/*",
    ]


def find_java() -> Path:
    """Java of JAVA_HOME or of PATH; ServiceMissing where it is absent or too old."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=f"{home}/bin") if home else shutil.which("java")
    version = 0
    if found is not None:
        match = re.search(rb'version "(\d+)', output([found, "-version"]))
        version = int(match[1]) if match else 0
    if found is None or version < JAVA_VERSION_MIN:
        raise ServiceMissing(
            f"Java {JAVA_VERSION_MIN} or newer is missing: install "
            f"openjdk-17-jre-headless, {OR_NAME_A_BROKER}"
        )
    return Path(found)


def kafka_version() -> str:
    """The version that demo/kafka/pom.xml pins."""
    match = re.search(r"<kafka\.version>(.+?)</kafka\.version>", POM.read_text())
    if match is None:
        raise ServerError(f"{POM} has no kafka.version")
    return match[1]


def kafka_libs() -> Path | None:
    """The folder with the broker's jars; None until `fetch_kafka` has filled it."""
    libs = PROJECT / "build" / f"kafka-libs-{kafka_version()}"
    marker = libs / "COMPLETE"
    if marker.is_file() and marker.read_text() == _pom_digest():
        return libs
    return None


def fetch_kafka() -> Path:
    """The folder with the broker's jars, which Maven fills at the first call.

    Two processes that call at once fetch once. A fetch that was cut off, or one of
    another pom.xml, is fetched anew. Raises ServiceMissing where Maven is absent or
    reaches no repository.
    """
    build = PROJECT / "build"
    build.mkdir(exist_ok=True)
    with (build / "kafka-libs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        libs = kafka_libs()
        if libs is None:
            libs = build / f"kafka-libs-{kafka_version()}"
            shutil.rmtree(libs, ignore_errors=True)
            libs.mkdir()
            _run_maven(libs)
            (libs / "COMPLETE").write_text(_pom_digest())
    return libs


def _run_maven(libs: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServiceMissing(
            "the Kafka jars are not there, nor is Maven, which fetches them: install "
            f"maven, {OR_NAME_A_BROKER}"
        )
    command: list[str | Path] = [
        maven,
        "-q",
        "-B",
        "-f",
        POM,
        "dependency:copy-dependencies",
    ]
    options = ["-DincludeScope=runtime", f"-DoutputDirectory={libs}"]
    try:
        run([*command, *options], log=libs / "maven.log", cwd=libs)
    except ServerError as error:
        raise ServiceMissing(
            f"the Kafka jars could not be fetched ({libs / 'maven.log'}): try `mvn` by "
            f"hand, {OR_NAME_A_BROKER}"
        ) from error


def _pom_digest() -> str:
    return hashlib.sha256(POM.read_bytes()).hexdigest()


def kafka_from_environment(env: Mapping[str, str]) -> KafkaCluster | None:
    """The cluster that KAFKA_BOOTSTRAP_SERVERS names; None when it is not set.

    KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD_FILE and KAFKA_SSL_CA_FILE must be set,
    too; the user must be allowed to make topics, users and ACLs. Where they aren't set,
    KAFKA_SECURITY_PROTOCOL is SASL_SSL and KAFKA_SASL_MECHANISM is SCRAM-SHA-512.

    Raises ServiceMissing when what is set can't be used.
    """
    servers = env.get("KAFKA_BOOTSTRAP_SERVERS")
    if not servers:
        return None
    user = env.get("KAFKA_SASL_USERNAME")
    if not user:
        raise ServiceMissing(
            "KAFKA_BOOTSTRAP_SERVERS is set, so KAFKA_SASL_USERNAME must be set, too"
        )
    password_file = given_file(
        env, "KAFKA_SASL_PASSWORD_FILE", "KAFKA_BOOTSTRAP_SERVERS"
    )
    return KafkaCluster(
        servers,
        ca=given_file(env, "KAFKA_SSL_CA_FILE", "KAFKA_BOOTSTRAP_SERVERS"),
        admin=user,
        admin_password=password_file.read_text().strip(),
        protocol=env.get("KAFKA_SECURITY_PROTOCOL") or "SASL_SSL",
        mechanism=env.get("KAFKA_SASL_MECHANISM") or "SCRAM-SHA-512",
    )
