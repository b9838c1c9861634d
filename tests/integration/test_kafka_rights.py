"""The Kafka users of manifests/kafka have exactly the rights that their work needs.

On a real broker with the authorizer: whatever is not theirs is refused as such, and
without any single right the work fails. Each user comes in by password and by
certificate, and nobody comes in otherwise.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from certs.make_certs import Certificates, make_certs
from demo.kafka_broker import Acl, Config, KafkaServer
from demo.strimzi_users import (
    DEAD_LETTER_WRITER,
    KEDA,
    PRODUCER,
    SOURCE,
    read_users,
    suffixed,
)
from tests.kafka_clients import DEADLINE_S, Reader, is_let_in, produce, refusals
from tests.servers import private_kafka

TOPIC = "topup-requests"
DEAD_LETTERS = "topup-dead-letters"
GROUP = "topup-source"
PARTITIONS = 2
USERS = read_users()
#: Let in, by password or certificate, but no manifest knows it.
NOBODY = "topup-nobody"
#: Its certificate has expired.
RETIRED = "topup-retired"

REFUSED = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}

numbers = count(1)


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    with private_kafka(
        tmp_path_factory.mktemp("kafka"),
        client_names=[*USERS, NOBODY],
        expired_client_names=[RETIRED],
    ) as server:
        for topic in (TOPIC, DEAD_LETTERS):
            server.create_topic(topic, PARTITIONS)
            assert produce(server.admin_config(), topic, "first") is None
        for user, acls in USERS.items():
            server.create_user(user, acls)
        server.create_user(NOBODY)
        # The first group waits until the broker has made the topic of the offsets.
        consume(server.admin_config(), GROUP)
        yield server


Way = Callable[[KafkaServer, str], Config]
WAYS: dict[str, Way] = {
    "password": KafkaServer.client_config,
    "certificate": KafkaServer.certificate_config,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


# -- What can be tried -------------------------------------------------------------
# Each raises KafkaException with the broker's code where it is refused.


def ask(
    config: Config, call: Callable[[AdminClient], Mapping[Any, Future[Any]]]
) -> Any:
    """What a call about one thing brings; the client lives until then."""
    client = AdminClient(config)
    (future,) = call(client).values()
    return future.result(DEADLINE_S)


def ends(config: Config, topic: str) -> list[int]:
    """The end of each partition: Metadata, then ListOffsets."""
    admin = AdminClient(config)
    described = admin.list_topics(topic, timeout=DEADLINE_S).topics[topic]
    if described.error:
        raise KafkaException(described.error)
    asked = {
        TopicPartition(topic, each): OffsetSpec.latest()  # type: ignore[no-untyped-call]
        for each in described.partitions
    }
    futures = admin.list_offsets(asked)
    return [each.result(DEADLINE_S).offset for each in futures.values()]


def committed(config: Config, group: str) -> list[int]:
    """The group's offset of each partition: FindCoordinator, OffsetFetch."""
    places = [TopicPartition(TOPIC, number) for number in range(PARTITIONS)]
    asked = [ConsumerGroupTopicPartitions(group, places)]
    found = ask(config, lambda admin: admin.list_consumer_group_offsets(asked))
    return offsets(found)


def commit(config: Config, group: str) -> None:
    """Commit the start of a group that nobody is in, as Knative's controller does."""
    places = [TopicPartition(TOPIC, number, 0) for number in range(PARTITIONS)]
    asked = [ConsumerGroupTopicPartitions(group, places)]
    changed = ask(config, lambda admin: admin.alter_consumer_group_offsets(asked))
    offsets(changed)


def offsets(answer: ConsumerGroupTopicPartitions) -> list[int]:
    places = answer.topic_partitions or []
    for place in places:
        if place.error:
            raise KafkaException(place.error)
    return [place.offset for place in places]


def write(config: Config, topic: str, *, is_idempotent: bool = True) -> None:
    asked = config | {"enable.idempotence": is_idempotent}
    code = produce(asked, topic, f"record-{next(numbers)}")
    if code is not None:
        raise KafkaException(KafkaError(code))


def read(config: Config, topic: str) -> None:
    """Fetch a record without being in a group."""
    ends(config, topic)
    deadline = time.monotonic() + DEADLINE_S
    with Reader(config, "in-no-group") as reader:
        places = [TopicPartition(topic, number, 0) for number in range(PARTITIONS)]
        reader.consumer.assign(places)
        while True:
            assert time.monotonic() < deadline, f"nothing of {topic}, and no refusal"
            message = reader.consumer.poll(0.2)
            error = message.error() if message else None
            # The client looks for its group's coordinator all the same.
            if error and error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
                raise KafkaException(error)
            if message and not error:
                return


def consume(config: Config, group: str) -> None:
    """Join a group, read to the end, commit, leave; again: there is nothing left."""
    with Reader(config, group) as reader:
        reader.consumer.subscribe([TOPIC])
        reader.read(1)
        reader.consumer.commit(asynchronous=False)


def delete_records(config: Config) -> None:
    ends(config, TOPIC)
    ask(config, lambda admin: admin.delete_records([TopicPartition(TOPIC, 0, 1)]))


def alter_topic(config: Config) -> None:
    change = ConfigEntry(
        "retention.ms", "1", incremental_operation=AlterConfigOpType.SET
    )
    resource = ConfigResource(
        ConfigResource.Type.TOPIC, TOPIC, incremental_configs=[change]
    )
    ask(config, lambda admin: admin.incremental_alter_configs([resource]))


def describe_topic_config(config: Config) -> None:
    resource = ConfigResource(ConfigResource.Type.TOPIC, TOPIC)
    ask(config, lambda admin: admin.describe_configs([resource]))


def grant_itself(config: Config) -> None:
    acl = AclBinding(
        ResourceType.TOPIC,
        TOPIC,
        ResourcePatternType.LITERAL,
        "User:*",
        "*",
        AclOperation.ALL,
        AclPermissionType.ALLOW,
    )
    ask(config, lambda admin: admin.create_acls([acl]))


def set_a_password(config: Config) -> None:
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion("admin", info, b"mine")
    ask(config, lambda admin: admin.alter_user_scram_credentials([change]))


def begin_a_transaction(config: Config) -> None:
    producer = Producer({**config, "transactional.id": "topup", "log_level": 0})
    producer.init_transactions(DEADLINE_S)


TRIED: dict[str, Callable[[Config], object]] = {
    "see the requests": lambda config: ends(config, TOPIC),
    "see the dead letters": lambda config: ends(config, DEAD_LETTERS),
    "write a request": lambda config: write(config, TOPIC),
    "write a dead letter": lambda config: write(
        config, DEAD_LETTERS, is_idempotent=False
    ),
    "read the requests": lambda config: read(config, TOPIC),
    "read the dead letters": lambda config: read(config, DEAD_LETTERS),
    "consume in the group": lambda config: consume(config, GROUP),
    "consume in another group": lambda config: consume(config, "another-group"),
    "commit for the group": lambda config: commit(config, GROUP),
    "commit for another group": lambda config: commit(config, "another-group"),
    "see the group's offsets": lambda config: committed(config, GROUP),
    "see another group's offsets": lambda config: committed(config, "another-group"),
    "describe the group": lambda config: ask(
        config, lambda admin: admin.describe_consumer_groups([GROUP])
    ),
    "delete the group": lambda config: ask(
        config, lambda admin: admin.delete_consumer_groups([GROUP])
    ),
    "delete records": delete_records,
    "create a topic": lambda config: ask(
        config, lambda admin: admin.create_topics([NewTopic("mistyped", 1)])
    ),
    "delete the topic": lambda config: ask(
        config, lambda admin: admin.delete_topics([TOPIC])
    ),
    "add partitions": lambda config: ask(
        config, lambda admin: admin.create_partitions([NewPartitions(TOPIC, 99)])
    ),
    "alter the topic": alter_topic,
    "see the topic's configuration": describe_topic_config,
    "begin a transaction": begin_a_transaction,
    "grant itself rights": grant_itself,
    "set a password": set_a_password,
}

#: User -> what works. Everything else that can be tried is refused.
WORKS = {
    PRODUCER: {"see the requests", "write a request"},
    SOURCE: {
        "see the requests",
        "read the requests",
        "consume in the group",
        "commit for the group",
        "see the group's offsets",
        "describe the group",
    },
    KEDA: {"see the requests", "see the group's offsets", "describe the group"},
    DEAD_LETTER_WRITER: {"see the dead letters", "write a dead letter"},
    NOBODY: set[str](),
}


def refusal(attempt: Callable[[Config], object], config: Config) -> int:
    """The code with which the broker refuses."""
    with pytest.raises(KafkaException) as refused:
        attempt(config)
    return int(refused.value.args[0].code())


def test_every_user_of_the_manifests_is_judged() -> None:
    assert set(WORKS) == set(USERS) | {NOBODY}


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("user", WORKS)
def test_a_user_may_do_what_it_is_for_and_nothing_else(
    kafka: KafkaServer, user: str, name: str
) -> None:
    config = kafka.client_config(user)
    if name in WORKS[user]:
        # Something to read, from the start on.
        commit(kafka.admin_config(), GROUP)
        TRIED[name](config)
    else:
        # Not merely any failure: the authorizer's own codes.
        assert refusal(TRIED[name], config) in REFUSED


# -- What each user is there for ---------------------------------------------------


def test_the_source_goes_on_where_it_committed(kafka: KafkaServer, way: Way) -> None:
    config = way(kafka, SOURCE)
    sent = {f"order-{next(numbers)}" for _ in range(10)}
    assert produce(way(kafka, PRODUCER), TOPIC, *sent) is None
    commit(config, GROUP)

    with Reader(config, GROUP) as reader:
        reader.consumer.subscribe([TOPIC])
        assert sent <= reader.read(sum(ends(config, TOPIC)))
        reader.consumer.commit(asynchronous=False)

    assert committed(config, GROUP) == ends(config, TOPIC)
    assert produce(way(kafka, PRODUCER), TOPIC, "the-next") is None
    with Reader(config, GROUP) as reader:
        reader.consumer.subscribe([TOPIC])
        assert reader.read(1) == {"the-next"}


def test_keda_sees_the_lag(kafka: KafkaServer, way: Way) -> None:
    config = way(kafka, KEDA)
    commit(kafka.admin_config(), GROUP)
    before = lag(config)

    assert produce(way(kafka, PRODUCER), TOPIC, "a", "b", "c") is None

    assert lag(config) == before + 3


def lag(config: Config) -> int:
    """As KEDA reckons it: what was written less what is committed."""
    places = zip(ends(config, TOPIC), committed(config, GROUP), strict=True)
    return sum(end - max(offset, 0) for end, offset in places)


def test_dead_letters_are_written_by_certificate_too(
    kafka: KafkaServer, way: Way
) -> None:
    before = ends(kafka.admin_config(), DEAD_LETTERS)

    write(way(kafka, DEAD_LETTER_WRITER), DEAD_LETTERS, is_idempotent=False)

    assert sum(ends(kafka.admin_config(), DEAD_LETTERS)) == sum(before) + 1


@pytest.mark.parametrize(
    ("user", "acl"),
    [
        pytest.param(
            user, acl, id=f"{user}-{acl.resource.name}-{acl.operation.name}".lower()
        )
        for user, acls in USERS.items()
        for acl in acls
    ],
)
def test_without_any_single_right_the_work_fails(
    kafka: KafkaServer, user: str, acl: Acl, way: Way
) -> None:
    config = way(kafka, user)
    commit(kafka.admin_config(), GROUP)
    kafka.revoke(user, acl)
    try:
        codes = set()
        for name in WORKS[user]:
            try:
                TRIED[name](config)
            except KafkaException as refused:
                codes.add(refused.args[0].code())
        assert codes
        assert codes <= REFUSED
    finally:
        kafka.grant(user, [acl])


def test_rights_by_certificate_are_those_of_its_name(kafka: KafkaServer) -> None:
    assert is_let_in(kafka.certificate_config(NOBODY))
    for name in ("see the requests", "describe the group"):
        assert refusal(TRIED[name], kafka.certificate_config(NOBODY)) in REFUSED
    for name in ("write a request", "delete the group", "commit for another group"):
        assert refusal(TRIED[name], kafka.certificate_config(SOURCE)) in REFUSED


# -- Who is let in -----------------------------------------------------------------


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of another CA, for the same names."""
    return make_certs(tmp_path_factory.mktemp("strangers"), client_names=[SOURCE])


def test_the_right_password_and_the_right_certificate_are_let_in(
    kafka: KafkaServer, way: Way
) -> None:
    assert is_let_in(way(kafka, SOURCE))


@pytest.mark.parametrize(
    "wrong", [{"sasl.password": "guessed"}, {"sasl.username": "topup-unknown"}]
)
def test_a_wrong_password_or_an_unknown_user_is_refused(
    kafka: KafkaServer, wrong: Config
) -> None:
    met = refusals(kafka.client_config(SOURCE) | wrong)
    assert "invalid credentials" in met[KafkaError._AUTHENTICATION]


def without_certificate(config: Config) -> Config:
    own = ("ssl.certificate.location", "ssl.key.location")
    return {name: value for name, value in config.items() if name not in own}


def test_a_client_without_certificate_is_refused(kafka: KafkaServer) -> None:
    config = without_certificate(kafka.certificate_config(SOURCE))
    assert "alert bad certificate" in refusals(config)[KafkaError._TRANSPORT]


def test_a_password_does_not_stand_in_for_a_certificate(kafka: KafkaServer) -> None:
    port = {"bootstrap.servers": kafka.certificate_config(SOURCE)["bootstrap.servers"]}
    met = refusals(kafka.client_config(SOURCE) | port)
    assert "alert bad certificate" in met[KafkaError._TRANSPORT]


def test_a_certificate_does_not_stand_in_for_a_password(kafka: KafkaServer) -> None:
    port: Config = {"bootstrap.servers": kafka.bootstrap_servers}
    told = len(kafka.log.read_text())

    assert KafkaError._ALL_BROKERS_DOWN in refusals(
        kafka.certificate_config(SOURCE) | port
    )

    assert "during SASL handshake" in kafka.log.read_text()[told:]


def test_an_expired_certificate_is_refused(kafka: KafkaServer) -> None:
    """Of the same CA, and like the others but for its date."""
    met = refusals(kafka.certificate_config(RETIRED))
    assert "alert certificate unknown" in met[KafkaError._TRANSPORT]


@pytest.mark.parametrize("whose", ["of another CA", "a server's"])
def test_a_certificate_that_is_no_clients_of_our_ca_is_refused(
    kafka: KafkaServer, strangers: Certificates, whose: str
) -> None:
    ours = kafka._certificates
    certificate, key = (
        strangers.clients[SOURCE]
        if whose == "of another CA"
        else (ours.server_cert, ours.server_key)
    )
    wrong: Config = {
        "ssl.certificate.location": str(certificate),
        "ssl.key.location": str(key),
    }
    met = refusals(kafka.certificate_config(SOURCE) | wrong)
    assert "alert certificate unknown" in met[KafkaError._TRANSPORT]


def test_a_broker_of_another_ca_is_not_trusted(
    kafka: KafkaServer, strangers: Certificates, way: Way
) -> None:
    wrong: Config = {"ssl.ca.location": str(strangers.ca)}
    met = refusals(way(kafka, SOURCE) | wrong)
    assert "certificate verify failed" in met[KafkaError._SSL]


def port_of(config: Config) -> int:
    return int(str(config["bootstrap.servers"]).rpartition(":")[2])


def test_a_plaintext_client_gets_an_alert_of_tls(kafka: KafkaServer, way: Way) -> None:
    config = way(kafka, SOURCE)
    # ApiVersions, the one request that nobody needs to log in for.
    request = bytes.fromhex("0000000a 0012 0000 00000001 ffff")
    with socket.create_connection(("127.0.0.1", port_of(config)), DEADLINE_S) as plain:
        plain.sendall(request)
        answer = plain.recv(100)
    assert answer[:2] == b"\x15\x03"
    protocol = "PLAINTEXT" if way is WAYS["certificate"] else "SASL_PLAINTEXT"

    assert refusals(without_certificate(config) | {"security.protocol": protocol})


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_only_tls_1_3_is_spoken(kafka: KafkaServer, way: Way, version: str) -> None:
    context = ssl.create_default_context(cafile=kafka.ca)
    context.maximum_version = ssl.TLSVersion[version]
    address = ("127.0.0.1", port_of(way(kafka, SOURCE)))

    with socket.create_connection(address, DEADLINE_S) as plain:
        if version == "TLSv1_3":
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                assert tls.version() == "TLSv1.3"
        else:
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                context.wrap_socket(plain, server_hostname="localhost")


# -- What the manifests may say ------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("patternType: literal", "patternType: prefix"),
        ("operations: [Write]", "operations: [Write]\n        host: 10.0.0.1"),
        ("operations: [Write]", "operations: [Write]\n        type: deny"),
        ("operations: [Write]", "operations: [Scribble]"),
        ("type: topic", "type: transactionalId"),
        ("type: simple", "type: custom"),
    ],
)
def test_a_user_that_is_not_understood_is_no_user_with_fewer_rights(
    tmp_path: Path, right: str, wrong: str
) -> None:
    folder = Path(__file__).parents[2] / "manifests" / "kafka"
    text = (folder / "producer-user.yaml").read_text()
    copy = tmp_path / "producer-user.yaml"
    copy.write_text(text)
    assert read_users(tmp_path)[PRODUCER] == USERS[PRODUCER]

    copy.write_text(text.replace(right, wrong))

    with pytest.raises(ValueError, match=r"producer-user\.yaml"):
        read_users(tmp_path)


def test_on_a_given_cluster_only_topics_have_other_names() -> None:
    acls = suffixed(USERS[SOURCE], ".1")
    assert [acl.name for acl in acls] == [f"{TOPIC}.1", GROUP]
    assert [acl.operation for acl in acls] == [acl.operation for acl in USERS[SOURCE]]
