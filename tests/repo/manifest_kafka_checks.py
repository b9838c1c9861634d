"""What the manifests say about Kafka, the source and KEDA agrees.

Each check takes all that is applied together and says in words what is wrong.
Must never ask a cluster.
"""

from collections.abc import Iterator
from typing import Final

from tests.repo.manifest_reading import (
    NAMESPACE,
    SINK,
    SOURCE,
    data_of,
    ours,
    references,
    seconds,
    settings_of,
)
from tests.repo.rendered import Document, address, field, find, of_kind


def triggers(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    """(ScaledObject, trigger)."""
    for scaled in of_kind(documents, "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield scaled, trigger


def check_topics(documents: list[Document]) -> list[str]:
    """Source, KEDA, sink and Kafka mean the same topics and group."""
    source, sink = find(documents, SOURCE), find(documents, SINK)
    known = {each["metadata"]["name"] for each in of_kind(documents, "KafkaTopic")}
    topics, group = (
        field(source, "spec.topics", []),
        field(source, "spec.consumerGroup"),
    )
    letters = field(sink, "spec.topic")
    problems = [f"there is no topic {each}" for each in {*topics, letters} - known]
    if len(topics) != 1 or topics == [letters]:
        problems.append("the source must read one topic, and not its dead letters'")
    if [field(source, "spec.ceOverrides.extensions.topic")] != topics:
        problems.append("ceOverrides names another topic than the source reads")
    if not group:
        problems.append("the source has no fixed consumerGroup")
    for scaled, trigger in triggers(documents):
        if [field(trigger, "metadata.topic")] != topics:
            problems.append(f"{address(scaled)}: topic differs from the source's")
        if field(trigger, "metadata.consumerGroup") != group:
            problems.append(f"{address(scaled)}: consumerGroup differs")
    return problems


def _clients(documents: list[Document]) -> Iterator[tuple[str, str, str, str]]:
    """(client, bootstrap server, how it authenticates, its KafkaUser)."""
    source, sink = find(documents, SOURCE) or {}, find(documents, SINK) or {}
    net = field(source, "spec.net", {})
    is_sasl = field(net, "sasl.enable", default=False)
    user = (
        field(net, "sasl.password.secretKeyRef.name")
        if is_sasl
        else field(net, "tls.key.secretKeyRef.name")
    )
    kind = "scram-sha-512" if is_sasl else "tls"
    for server in field(source, "spec.bootstrapServers", []):
        yield SOURCE, server, kind, user
    for server in field(sink, "spec.bootstrapServers", []):
        # Its Secret is made by hand, for the listener that the source uses.
        yield SINK, server, kind, "topup-dead-letter-writer"
    for scaled, trigger in triggers(documents):
        name = field(trigger, "authenticationRef.name")
        authentication = find(documents, f"TriggerAuthentication/{name}") or {}
        secrets = {
            each["parameter"]: each["name"]
            for each in field(authentication, "spec.secretTargetRef", [])
        }
        kind = "scram-sha-512" if field(trigger, "metadata.sasl") else "tls"
        user = secrets.get("password" if kind != "tls" else "key", "")
        for server in trigger["metadata"]["bootstrapServers"].split(","):
            yield address(scaled), server, kind, user


def check_listeners(documents: list[Document]) -> list[str]:
    """Each client meets a listener that authenticates as the client and its user do."""
    problems = []
    kafka = find(documents, "Kafka/topup-kafka") or {}
    listeners = {
        f"topup-kafka-kafka-bootstrap.{NAMESPACE}.svc:{each['port']}": field(
            each, "authentication.type"
        )
        for each in field(kafka, "spec.kafka.listeners", [])
    }
    for client, server, kind, user in _clients(documents):
        if listeners.get(server) != kind:
            problems.append(f"{client}: no listener {server} takes {kind}")
        account = find(documents, f"KafkaUser/{user}")
        if field(account, "spec.authentication.type") != kind:
            problems.append(f"{client}: {user} does not authenticate by {kind}")
    source = find(documents, SOURCE) or {}
    if field(source, "spec.net.tls.enable") is not True:
        problems.append(f"{SOURCE}: no TLS")
    if field(source, "spec.net.sasl.enable", default=False):
        sasl = data_of(find(documents, "Secret/topup-source-sasl"))
        if sasl != {"user": "topup-source", "type": "SCRAM-SHA-512"}:
            problems.append(f"{SOURCE}: user or mechanism is not that of the KafkaUser")
    for scaled, trigger in triggers(documents):
        if field(trigger, "metadata.tls") != "enable":
            problems.append(f"{address(scaled)}: no TLS")
        if field(trigger, "metadata.unsafeSsl", "false") != "false":
            problems.append(f"{address(scaled)}: takes any certificate")
    return problems


def check_certificate_authorities(documents: list[Document]) -> list[str]:
    """The brokers are trusted by the cluster's CA; a user's own ca.crt is another."""
    wanted = "Secret/topup-kafka-cluster-ca-cert", "ca.crt"
    source = find(documents, SOURCE) or {}
    trusted = {SOURCE: list(references(field(source, "spec.net.tls.caCert", {})))}
    for each in of_kind(documents, "TriggerAuthentication"):
        targets = field(each, "spec.secretTargetRef", [])
        trusted[address(each)] = [
            (f"Secret/{t['name']}", t["key"]) for t in targets if t["parameter"] == "ca"
        ]
    return [
        f"{name}: does not trust the brokers' CA"
        for name, references in trusted.items()
        if references != [wanted]
    ]


def check_kafka(documents: list[Document]) -> list[str]:
    """TLS 1.3 and a right for everything; what is acknowledged is not lost."""
    kafka = find(documents, "Kafka/topup-kafka") or {}
    config = field(kafka, "spec.kafka.config", {})
    problems = [
        f"listener {each['name']} is open"
        for each in field(kafka, "spec.kafka.listeners", [])
        if each["tls"] is not True or "authentication" not in each
    ]
    if field(kafka, "spec.kafka.authorization") != {"type": "simple"}:
        problems.append("no authorization, or somebody is above it")
    for name, value in (
        ("ssl.enabled.protocols", "TLSv1.3"),
        ("auto.create.topics.enable", False),
        ("unclean.leader.election.enable", False),
    ):
        if config.get(name) != value:
            problems.append(f"{name} is not {value}")
    nodes = sum(
        field(each, "spec.replicas", 0) for each in of_kind(documents, "KafkaNodePool")
    )
    for topic in of_kind(documents, "KafkaTopic"):
        replicas = field(topic, "spec.replicas", 0)
        minimum = field(topic, "spec.config.min|insync|replicas", 0)
        # A copy may be away, and no more than that.
        if replicas > nodes or minimum != max(1, replicas - 1):
            problems.append(f"{address(topic)}: replicas, of which in sync, nodes")
    kept_s = 60 * config.get("offsets.retention.minutes", 10080)
    if kept_s <= float(settings_of(documents)["TOPIC_RETENTION_S"]):
        problems.append("an empty group forgets before the topic does")
    return problems


#: Principal -> (resource, name, operations); nothing else may be given.
RIGHTS: Final = {
    "topup-producer": {("topic", "topup-requests"): {"Write"}},
    "topup-source": {
        ("topic", "topup-requests"): {"Read"},
        ("group", "topup-source"): {"Read"},
    },
    "topup-keda": {
        ("topic", "topup-requests"): {"Describe"},
        ("group", "topup-source"): {"Describe"},
    },
    "topup-dead-letter-writer": {("topic", "topup-dead-letters"): {"Write"}},
}


def check_rights(documents: list[Document]) -> list[str]:
    """Four users, each with the least rights that work."""
    found: dict[str, dict[tuple[str, str], set[str]]] = {}
    problems = []
    for user in of_kind(documents, "KafkaUser"):
        mine = found.setdefault(user["metadata"]["name"], {})
        for acl in field(user, "spec.authorization.acls", []):
            resource = acl["resource"]
            mine[resource["type"], resource["name"]] = set(acl["operations"])
            if resource.get("patternType", "literal") != "literal" or "type" in acl:
                problems.append(f"{address(user)}: not one resource by its whole name")
    return problems + [
        f"{name}: {found.get(name)} instead of {RIGHTS.get(name)}"
        for name in sorted(RIGHTS.keys() | found.keys())
        if RIGHTS.get(name) != found.get(name)
    ]


def check_delivery(documents: list[Document]) -> list[str]:
    """In order, from the beginning, for longer than the topic keeps a record."""
    source = find(documents, SOURCE) or {}
    settings = settings_of(documents)
    problems = [
        f"{path} is not {value}"
        for path, value in (
            ("spec.ordering", "ordered"),
            ("spec.initialOffset", "earliest"),
            ("spec.delivery.backoffPolicy", "linear"),
        )
        if field(source, path) != value
    ]
    retries = field(source, "spec.delivery.retry", 0)
    delay_s = seconds(field(source, "spec.delivery.backoffDelay", ""))
    timeout_s = seconds(field(source, "spec.delivery.timeout", ""))
    # Milliseconds, as the dispatcher counts: with less than one it never tries again.
    if not delay_s >= 0.001:
        problems.append("backoffDelay is below a millisecond")
    if not delay_s * retries * (retries + 1) / 2 > float(settings["TOPIC_RETENTION_S"]):
        problems.append("the source gives up before the topic forgets")
    longest_s = delay_s * retries + timeout_s
    if not longest_s <= float(settings["EVENT_REDELIVERY_MAX_S"]):
        problems.append("the longest backoff exceeds EVENT_REDELIVERY_MAX_S")
    letters = field(source, "spec.delivery.deadLetterSink.ref", {})
    if not find(documents, f"{letters.get('kind')}/{letters.get('name')}"):
        problems.append("no dead letter sink: what is refused would be dropped")
    if field(find(documents, SINK), "spec.contentMode") != "binary":
        problems.append("dead letters are not kept as they came")
    sink = field(source, "spec.sink.ref", {})
    is_knative = sink.get("apiVersion") == "serving.knative.dev/v1"
    if not find(
        documents, ("Knative" if is_knative else "") + "Service/topup-function"
    ):
        problems.append("the source posts to nobody")
    return problems


def check_retention(documents: list[Document]) -> list[str]:
    """What the settings believe of the topics is so, and nothing is purged before."""
    settings = settings_of(documents)
    problems = []
    for topic, name in (
        ("topup-requests", "TOPIC_RETENTION_S"),
        ("topup-dead-letters", "DEAD_LETTER_RETENTION_S"),
    ):
        kept_ms = field(
            find(documents, f"KafkaTopic/{topic}"), "spec.config.retention|ms", 0
        )
        if kept_ms != 1000 * float(settings[name]):
            problems.append(f"{topic}: retention.ms is not {name}")
    horizon_s = sum(
        float(settings[name])
        for name in ("TOPIC_RETENTION_S", "DEAD_LETTER_RETENTION_S", "REPLAY_HORIZON_S")
    )
    for name, _, container in ours(documents):
        command = container.get("command", [])
        if "purge" in command and "--payloads" not in command:
            days = int(command[command.index("--older-than") + 1].removesuffix("d"))
            if days * 86400 < horizon_s:
                problems.append(f"{name}: purges what could still come again")
    return problems


def check_one_scaler(documents: list[Document]) -> list[str]:
    """One scaler, of something that is there and that no apply sets back."""
    problems = []
    if len(of_kind(documents, "ScaledObject")) > 1:
        problems.append("two scalers watch one lag")
    annotation = "metadata.annotations.autoscaling|eventing|knative|dev/class"
    if field(find(documents, SOURCE), annotation) != "disabled":
        problems.append("Knative's own KEDA would scale as well")
    for scaled in of_kind(documents, "ScaledObject"):
        target = "{kind}/{name}".format(**scaled["spec"]["scaleTargetRef"])
        if not find(documents, target):
            problems.append(f"there is no {target} to scale")
        replicas = "spec.consumers" if target == SOURCE else "spec.replicas"
        if field(find(documents, target), replicas) is not None:
            problems.append(f"{target}: an apply would set {replicas} back")
    return problems


def check_lag_scaling(documents: list[Document]) -> list[str]:
    """KEDA never scales to 0, never above the partitions, and is calm."""
    topic = find(documents, "KafkaTopic/topup-requests")
    reset = field(find(documents, SOURCE), "spec.initialOffset")
    delivery_s = float(settings_of(documents)["EVENT_DELIVERY_TIMEOUT_S"])
    problems = []
    for scaled, trigger in triggers(documents):
        spec, metadata = scaled["spec"], trigger["metadata"]
        if spec.get("maxReplicaCount", 100) != field(topic, "spec.partitions"):
            problems.append("maxReplicaCount is not the number of partitions")
        if spec.get("minReplicaCount", 0) < 1:
            problems.append("scales to 0")
        if metadata.get("offsetResetPolicy") != reset:
            problems.append("offsetResetPolicy is not the source's initialOffset")
        # 60 a second, the worked example of keda/README.md, committed every 5 s.
        if float(metadata.get("lagThreshold", "10")) < 2 * 60 * 5:
            problems.append("lagThreshold is near what is done but not committed")
        if metadata.get("allowIdleConsumers") == "true":
            problems.append("allowIdleConsumers lifts the cap at the partitions")
        is_slow = (
            trigger.get("useCachedMetrics") and spec["pollingInterval"] > delivery_s
        )
        if metadata.get("excludePersistentLag") != "true" or not is_slow:
            problems.append("a stuck partition scales up, or a slow one looks stuck")
        behavior = field(spec, "advanced.horizontalPodAutoscalerConfig.behavior", {})
        if not (field(behavior, "scaleUp") and field(behavior, "scaleDown")):
            problems.append("scales as fast as it can: each step restarts a consumer")
    return problems


def check_revision_scaling(documents: list[Document]) -> list[str]:
    """Knative never scales the function to 0, nor past what partitions can use."""
    service = find(documents, "KnativeService/topup-function")
    if service is None:
        return []
    topic = find(documents, "KafkaTopic/topup-requests")
    partitions = field(topic, "spec.partitions", 0)
    threads = int(settings_of(documents)["SERVER_THREADS"])
    notes = "spec.template.metadata.annotations.autoscaling|knative|dev/"
    least = int(field(service, f"{notes}min-scale", "0"))
    most = int(field(service, f"{notes}max-scale", "0"))
    problems = [] if least >= 1 else ["the function scales to 0"]
    if most * threads < partitions or most > partitions:
        problems.append("max-scale does not fit the partitions")
    return problems
