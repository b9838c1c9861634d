"""Whether there is one scaler that agrees with topic, group and partitions.

Owns what is checked about KEDA's objects; must never read anything itself.
"""

from collections.abc import Iterator
from typing import Final

from function.doctor import documents as kinds
from function.doctor.diagnosis import Diagnosis, error, ok, skipped, unknown, warning
from function.doctor.documents import Document, Parts, at, items, number, subject_of
from function.doctor.source import is_ready

#: What KEDA's kafka trigger reads; it says nothing of a word that it doesn't know.
#: A test compares it with KEDA's own schema where that is at hand.
TRIGGER_WORDS: Final = frozenset(
    {
        "bootstrapServers",
        "bootstrapServersFromEnv",
        "consumerGroup",
        "consumerGroupFromEnv",
        "topic",
        "topicFromEnv",
        "lagThreshold",
        "activationLagThreshold",
        "offsetResetPolicy",
        "allowIdleConsumers",
        "limitToPartitionsWithLag",
        "ensureEvenDistributionOfPartitions",
        "excludePersistentLag",
        "scaleToZeroOnInvalidOffset",
        "partitionLimitation",
        "version",
        "tls",
        "unsafeSsl",
        "sasl",
        "saslTokenProvider",
        "awsRegion",
    }
)
_MECHANISMS: Final = frozenset({"scram_sha256", "scram_sha512"})
_CLASS: Final = "autoscaling.eventing.knative.dev/class"
_ONE_SCALER: Final = "keep one: two move the same pods by the same lag"


def check_scaling(parts: Parts) -> Iterator[Diagnosis]:
    """Everything about who scales, and how."""
    ours = _of_this_group(parts)
    yield from _rivals(parts, ours)
    for scaled in ours:
        yield from _scaled_object(parts, scaled)


def _targets(parts: Parts, target: object) -> bool:
    """Whether a scaler's target is the source, the function, or what they made."""
    name = at(target, "name")
    # KEDA's default, and HPA's usual.
    kind = at(target, "kind") or "Deployment"
    if parts.source is not None:
        uid = at(parts.source, "metadata", "uid")
        if kind == "KafkaSource" and name == kinds.name_of(parts.source):
            return True
        if kind == "ConsumerGroup" and uid is not None and name == uid:
            return True
    if parts.function is not None and name is not None:
        own = kinds.name_of(parts.function)
        is_knative = kinds.kind_of(parts.function) == kinds.KNATIVE_SERVICE
        # The Deployments of a Knative Service are named after its revisions.
        is_revision = is_knative and str(name).startswith(f"{own}-")
        return name == own or (kind == "Deployment" and is_revision)
    return False


def _triggers(scaled: Document) -> list[Document]:
    return [
        each
        for each in items(at(scaled, "spec", "triggers"))
        if each.get("type") in ("kafka", "apache-kafka")
    ]


def _of_this_group(parts: Parts) -> list[Document]:
    """The ScaledObjects of our target, or that watch our group's lag."""
    group = at(parts.source, "spec", "consumerGroup")
    return [
        scaled
        for scaled in parts.documents.of_kind(kinds.SCALED_OBJECT)
        if _targets(parts, at(scaled, "spec", "scaleTargetRef"))
        or any(
            group is not None and at(each, "metadata", "consumerGroup") == group
            for each in _triggers(scaled)
        )
    ]


def _rivals(parts: Parts, ours: list[Document]) -> Iterator[Diagnosis]:
    documents = parts.documents
    foreign = [
        each
        for each in documents.of_kind(kinds.AUTOSCALER)
        if _targets(parts, at(each, "spec", "scaleTargetRef"))
        and not any(
            owner.get("kind") == "ScaledObject"
            for owner in items(at(each, "metadata", "ownerReferences"))
        )
    ]
    built_in = list(_built_in(parts))
    names = [subject_of(each) for each in (*ours, *foreign)]
    if len(names) > 1:
        yield error(", ".join(names), "two scalers watch one thing", _ONE_SCALER)
    elif names and not built_in:
        yield ok(names[0], "is the only scaler")
    elif not names and documents.is_readable(kinds.SCALED_OBJECT):
        if documents.is_live:
            yield warning(
                "ScaledObject",
                "nothing scales on the consumer lag",
                "apply keda/, or keep a fixed number on purpose",
            )
        else:
            yield skipped("ScaledObject", "is not among the documents")
    if names:
        yield from built_in


def _built_in(parts: Parts) -> Iterator[Diagnosis]:
    """Knative's own integration, which makes a second ScaledObject and wins."""
    if parts.source is None:
        return
    class_ = kinds.annotation(parts.source, _CLASS)
    subject = subject_of(parts.source)
    documents = parts.documents
    if class_ == "disabled":
        return
    features = documents.find(
        kinds.CONFIG_MAP, kinds.FEATURES_OF_KAFKA, kinds.EVENTING_NAMESPACE
    )
    data = kinds.data_of(features) if features is not None else {}
    state = data.get("controller-autoscaler-keda", data.get("controller.autoscaler"))
    if str(state).lower() == "enabled":
        yield error(
            subject,
            "Knative's own KEDA integration scales it, too, and ignores consumers",
            f"set the annotation {_CLASS}: disabled",
        )
    elif features is None and documents.is_live:
        name = f"{kinds.EVENTING_NAMESPACE}/{kinds.FEATURES_OF_KAFKA}"
        if documents.is_readable(kinds.CONFIG_MAP, kinds.FEATURES_OF_KAFKA):
            yield unknown(
                subject,
                f"{name} is not there, which says whether Knative scales it, too",
                f"set the annotation {_CLASS}: disabled, then it doesn't matter",
            )


def _scaled_object(parts: Parts, scaled: Document) -> Iterator[Diagnosis]:
    subject = subject_of(scaled)
    yield from is_ready(parts, scaled)
    yield from _target(parts, scaled)
    yield from _bounds(parts, scaled)
    triggers = _triggers(scaled)
    if len(triggers) != 1:
        yield error(
            subject,
            f"has {len(triggers)} kafka triggers",
            "one: the lag of the source's group on its topic",
        )
    for trigger in triggers:
        yield from _trigger(parts, subject, trigger)
        yield from _values(subject, trigger)
        yield from _authentication(parts, subject, trigger)
    annotations = at(scaled, "metadata", "annotations")
    if isinstance(annotations, dict):
        paused = [each for each in annotations if "keda.sh/paused" in str(each)]
        if paused:
            yield warning(subject, "is paused", f"remove the annotation {paused[0]}")


def _target(parts: Parts, scaled: Document) -> Iterator[Diagnosis]:
    target = at(scaled, "spec", "scaleTargetRef")
    subject = subject_of(scaled)
    function = parts.function
    is_knative = (
        function is not None and kinds.kind_of(function) == kinds.KNATIVE_SERVICE
    )
    if at(target, "kind") == "KafkaSource":
        consumers = number(at(parts.source, "spec", "consumers"))
        # A live source has the number that KEDA has set.
        if consumers is not None and not parts.documents.is_live:
            yield warning(
                subject_of(parts.source or {}),
                "sets consumers, which KEDA scales: each apply sets it back",
                "remove consumers from the manifest",
            )
        if not _targets(parts, target):
            yield error(
                subject,
                f"scales {at(target, 'name')}, which is not our KafkaSource",
                "correct scaleTargetRef.name",
            )
    elif function is not None and is_knative and _targets(parts, target):
        yield error(
            subject,
            "scales a Knative Service, which only Knative's own autoscaler may",
            "let it scale the KafkaSource, or use the overlay `deployment`",
        )
    elif not _targets(parts, target):
        yield error(
            subject,
            f"watches our group, but scales {at(target, 'kind') or 'Deployment'}/"
            f"{at(target, 'name')}",
            "correct scaleTargetRef",
        )


def _bounds(parts: Parts, scaled: Document) -> Iterator[Diagnosis]:
    subject = subject_of(scaled)
    spec = at(scaled, "spec")
    # KEDA's defaults, where nothing is said.
    least = number(at(spec, "minReplicaCount")) or 0
    most = number(at(spec, "maxReplicaCount"))
    most = 100 if most is None else most
    if least < 1 or at(spec, "idleReplicaCount") is not None:
        yield error(
            subject,
            "may scale to 0: the group's offsets expire while nobody is in it",
            "set minReplicaCount: 1, and no idleReplicaCount",
        )
    partitions = parts.partitions
    if partitions is None:
        yield unknown(
            subject,
            "how many partitions the topic has, no KafkaTopic says",
            "say --partitions N",
        )
    elif most > partitions:
        yield error(
            subject,
            f"maxReplicaCount is {most:g}, the topic has {partitions} partitions: the "
            "rest would idle, and restart the others for nothing",
            f"set maxReplicaCount: {partitions}",
        )
    elif most < partitions and at(spec, "scaleTargetRef", "kind") == "KafkaSource":
        yield warning(
            subject,
            f"maxReplicaCount is {most:g}, the topic has {partitions} partitions",
            f"set maxReplicaCount: {partitions}",
        )
    else:
        yield ok(subject, f"maxReplicaCount {most:g} fits the {partitions} partitions")


def _trigger(parts: Parts, subject: str, trigger: Document) -> Iterator[Diagnosis]:
    """The trigger watches what the source reads."""
    told = trigger.get("metadata")
    spec = at(parts.source, "spec")
    strange = set(told) - TRIGGER_WORDS if isinstance(told, dict) else set()
    for word in sorted(map(str, strange)):
        yield error(
            subject,
            f"{word} is no word of the kafka trigger: KEDA ignores it silently",
            "correct it",
        )
    if spec is None:
        return
    topic = next(iter(kinds.topics_of(parts.source)), None)
    pairs = (
        ("topic", at(told, "topic"), topic),
        ("consumerGroup", at(told, "consumerGroup"), at(spec, "consumerGroup")),
    )
    wrong = [(name, here, there) for name, here, there in pairs if here != there]
    for name, here, there in wrong:
        yield error(
            subject,
            f"its {name} is {here or 'not set'}, the source's is {there or 'not set'}",
            f"set {name}: {there}" if there else f"set {name} on both",
        )
    if not wrong:
        yield ok(subject, "watches the source's topic and group")
    theirs = set(kinds.texts(at(spec, "bootstrapServers")))
    if set(str(at(told, "bootstrapServers") or "").split(",")) != theirs:
        yield warning(
            subject,
            "its bootstrapServers are not the source's",
            "make sure that it is the same cluster",
        )


def _values(subject: str, trigger: Document) -> Iterator[Diagnosis]:
    """Each trap of the kafka trigger."""
    told = trigger.get("metadata")

    def is_on(name: str) -> bool:
        return str(at(told, name)).lower() == "true"

    if at(told, "offsetResetPolicy") != "earliest":
        yield warning(
            subject,
            "offsetResetPolicy is not earliest, as the source's initialOffset is: a "
            "new partition's lag is not counted",
            "set offsetResetPolicy: earliest",
        )
    if is_on("scaleToZeroOnInvalidOffset"):
        yield error(
            subject,
            "scaleToZeroOnInvalidOffset: a group without an offset never wakes",
            "remove it",
        )
    if is_on("allowIdleConsumers"):
        yield warning(
            subject,
            "allowIdleConsumers lifts the limit at the number of partitions",
            "remove it",
        )
    if is_on("excludePersistentLag") and trigger.get("useCachedMetrics") is not True:
        yield warning(
            subject,
            "excludePersistentLag without useCachedMetrics takes a slow record for a "
            "stuck one",
            "set useCachedMetrics: true",
        )
    if is_on("unsafeSsl"):
        yield error(
            subject, "unsafeSsl: Kafka's certificate is not verified", "remove it"
        )


def _authentication(
    parts: Parts, subject: str, trigger: Document
) -> Iterator[Diagnosis]:
    told = trigger.get("metadata")
    name = at(trigger, "authenticationRef", "name")
    if at(trigger, "authenticationRef", "kind") == "ClusterTriggerAuthentication":
        yield skipped(subject, f"ClusterTriggerAuthentication/{name} is not looked at")
        return
    documents = parts.documents
    found = documents.find(kinds.TRIGGER_AUTHENTICATION, name)
    if found is None:
        if name is None:
            yield error(
                subject, "has no authenticationRef", "refer to a TriggerAuthentication"
            )
        elif not documents.is_live:
            yield skipped(f"TriggerAuthentication/{name}", "is not among the documents")
        elif documents.is_readable(kinds.TRIGGER_AUTHENTICATION):
            yield error(
                f"TriggerAuthentication/{name}",
                f"does not exist; {subject} needs it",
                "apply keda/",
            )
        return
    given = {
        str(each.get("parameter"))
        for part in ("secretTargetRef", "configMapTargetRef", "env")
        for each in items(at(found, "spec", part))
    }
    yield from _credentials(subject, found, told, given)


def _credentials(
    subject: str, found: Document, told: object, given: set[str]
) -> Iterator[Diagnosis]:
    """The trigger's words and its TriggerAuthentication's parameters fit."""
    if at(told, "tls") != "enable" and "tls" not in given:
        yield error(subject, "talks to Kafka in plain text", "set tls: enable")
    mechanism = at(told, "sasl")
    if mechanism is None and "sasl" not in given:
        if not {"cert", "key"} <= given:
            yield error(
                subject,
                "has neither SASL nor a client certificate",
                "set sasl: scram_sha512, or give cert and key",
            )
    elif mechanism is not None and str(mechanism) not in _MECHANISMS:
        yield error(
            subject,
            f"sasl is {mechanism}: KEDA spells the mechanism in its own way",
            "set sasl: scram_sha512",
        )
    elif not {"username", "password"} <= given:
        yield error(
            subject_of(found),
            "gives no username and password",
            "add both to secretTargetRef",
        )
