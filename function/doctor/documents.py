"""Kubernetes objects as plain documents, and which of them belong together.

Owns finding one's way through them: from the KafkaSource to its sink, topics, settings
and secrets. Must never do I/O, hold a secret's value, or judge what it finds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

Document = Mapping[str, Any]

#: Kinds as this project names them: the kind, and its API group unless it is core.
KAFKA_SOURCE: Final = "KafkaSource.sources.knative.dev"
KNATIVE_SERVICE: Final = "Service.serving.knative.dev"
KAFKA_SINK: Final = "KafkaSink.eventing.knative.dev"
SCALED_OBJECT: Final = "ScaledObject.keda.sh"
TRIGGER_AUTHENTICATION: Final = "TriggerAuthentication.keda.sh"
KAFKA_TOPIC: Final = "KafkaTopic.kafka.strimzi.io"
DEPLOYMENT: Final = "Deployment.apps"
AUTOSCALER: Final = "HorizontalPodAutoscaler.autoscaling"
CRON_JOB: Final = "CronJob.batch"
JOB: Final = "Job.batch"
SERVICE: Final = "Service"
CONFIG_MAP: Final = "ConfigMap"
SECRET: Final = "Secret"  # noqa: S105

#: Where the search begins; from there on the objects' own references lead.
NAMESPACE: Final = "topup"
SOURCE_NAME: Final = "topup-source"
FUNCTION_NAME: Final = "topup-function"
RESOLVER_NAME: Final = "topup-resolver"
#: Where Knative Eventing keeps its settings.
EVENTING_NAMESPACE: Final = "knative-eventing"
FEATURES_OF_KAFKA: Final = "config-kafka-features"
FEATURES: Final = "config-features"

#: What a variable has whose value is a secret's.
HIDDEN: Final = "(hidden)"


def kind_of(document: Document) -> str:
    """The kind with its group, such as `Deployment.apps`."""
    group, slash, _ = str(document.get("apiVersion", "")).partition("/")
    kind = str(document.get("kind", ""))
    return f"{kind}.{group}" if slash else kind


def at(document: object, *path: str) -> Any:
    """What stands at a path of names; None where the path ends early."""
    for name in path:
        if not isinstance(document, Mapping):
            return None
        document = document.get(name)
    return document


def name_of(document: Document) -> str:
    """The object's own name."""
    return str(at(document, "metadata", "name") or "")


def namespace_of(document: Document) -> str:
    """The object's namespace; empty when it names none."""
    return str(at(document, "metadata", "namespace") or "")


def subject_of(document: Document) -> str:
    """The object as a line of the report names it."""
    return f"{document.get('kind')}/{name_of(document)}"


def items(value: object) -> list[Document]:
    """The mappings of a list; nothing where there is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [each for each in value if isinstance(each, Mapping)]


def number(value: object) -> float | None:
    """A finite number, also one that is written as text; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if isfinite(found) else None


def texts(value: object) -> list[str]:
    """The elements of a list as text; nothing where there is no list."""
    return [str(each) for each in value] if isinstance(value, list) else []


def annotation(document: Document, name: str) -> str:
    """An annotation's text; empty when it isn't there."""
    return str(at(document, "metadata", "annotations", name) or "")


def condition(document: Document, type_: str) -> Document | None:
    """The status condition of a type, if the controller has written one."""
    for each in items(at(document, "status", "conditions")):
        if each.get("type") == type_:
            return each
    return None


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Everything that was read, and what could not be."""

    namespace: str
    objects: Sequence[Document] = ()
    is_live: bool = True
    #: Kinds, and `Secret/name` or `ConfigMap/name`, that could not be read.
    unread: frozenset[str] = frozenset()
    #: `group/version` -> its resources, of the APIs that were asked for.
    served: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Document]:
        """Every object of a kind, wherever it lives."""
        return [each for each in self.objects if kind_of(each) == kind]

    def find(self, kind: str, name: object, namespace: str = "") -> Document | None:
        """One object; a document that names no namespace fits each."""
        wanted = namespace or self.namespace
        for each in self.of_kind(kind):
            if name_of(each) == name and namespace_of(each) in {"", wanted}:
                return each
        return None

    def is_readable(self, kind: str, name: object = None) -> bool:
        """Whether an object that is not among the documents does not exist."""
        return not {kind, f"{kind}/{name}"} & self.unread


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The objects that work together, as their references lead from one to the next."""

    documents: Documents
    source: Document | None
    #: The Knative Service, or the Deployment behind the sink's Service.
    function: Document | None
    resolver: Document | None
    #: The KafkaSink that takes dead letters, when it is one.
    dead_letter_sink: Document | None
    topic: Document | None
    dead_letter_topic: Document | None
    #: From the command line, where no KafkaTopic says it.
    partitions_given: int | None = None

    @property
    def partitions(self) -> int | None:
        """How many partitions the topic of orders has, if anything says it."""
        if self.topic is None:
            return self.partitions_given
        found = number(at(self.topic, "spec", "partitions"))
        return int(found) if found is not None else None

    @property
    def pods(self) -> list[Document]:
        """What runs our image with our settings."""
        return [each for each in (self.function, self.resolver) if each is not None]


def parts_of(documents: Documents, partitions: int | None = None) -> Parts:
    """Follow the references, beginning at the KafkaSource."""
    source = _by_name_or_alone(documents, KAFKA_SOURCE, SOURCE_NAME)
    sink = _referred(documents, at(source, "spec", "delivery", "deadLetterSink", "ref"))
    is_kafka_sink = sink is not None and kind_of(sink) == KAFKA_SINK
    return Parts(
        documents=documents,
        source=source,
        function=_function(documents, source),
        resolver=documents.find(DEPLOYMENT, RESOLVER_NAME),
        dead_letter_sink=sink if is_kafka_sink else None,
        topic=topic_named(documents, next(iter(topics_of(source)), None)),
        dead_letter_topic=topic_named(
            documents, at(sink, "spec", "topic") if is_kafka_sink else None
        ),
        partitions_given=partitions,
    )


def topics_of(source: Document | None) -> list[str]:
    """The topics that a KafkaSource reads."""
    return texts(at(source, "spec", "topics"))


def topic_named(documents: Documents, name: object) -> Document | None:
    """The KafkaTopic of a topic, whose own name may be another."""
    if name is None:
        return None
    for each in documents.of_kind(KAFKA_TOPIC):
        if (at(each, "spec", "topicName") or name_of(each)) == name:
            return each
    return None


def _by_name_or_alone(documents: Documents, kind: str, name: str) -> Document | None:
    found = documents.find(kind, name)
    everything = documents.of_kind(kind)
    return everything[0] if found is None and len(everything) == 1 else found


def _referred(documents: Documents, reference: object) -> Document | None:
    if not isinstance(reference, Mapping):
        return None
    namespace = str(reference.get("namespace") or "")
    return documents.find(kind_of(reference), reference.get("name"), namespace)


def _function(documents: Documents, source: Document | None) -> Document | None:
    """What the source delivers to: a Knative Service, or a Service's Deployment."""
    sink = _referred(documents, at(source, "spec", "sink", "ref"))
    if sink is None:
        return documents.find(KNATIVE_SERVICE, FUNCTION_NAME) or documents.find(
            DEPLOYMENT, FUNCTION_NAME
        )
    if kind_of(sink) != SERVICE:
        return sink
    wanted = at(sink, "spec", "selector")
    for each in documents.of_kind(DEPLOYMENT):
        labels = at(each, "spec", "template", "metadata", "labels")
        if (
            isinstance(wanted, Mapping)
            and isinstance(labels, Mapping)
            and wanted
            and wanted.items() <= labels.items()
        ):
            return each
    return None


# -- Pods ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reference:
    """One object that another needs, with the key in it, if one is named."""

    #: SECRET or CONFIG_MAP.
    kind: str
    name: str
    key: str | None
    #: Who needs it, and where it says so.
    needed_by: str


def pod_spec(document: Document) -> Document:
    """The pod of a Knative Service, Deployment or (Cron)Job."""
    spec = at(document, "spec", "template", "spec")
    if spec is None:
        spec = at(document, "spec", "jobTemplate", "spec", "template", "spec")
    return spec if isinstance(spec, Mapping) else {}


def container_of(document: Document) -> Document:
    """The first container, which runs our image."""
    return next(iter(items(pod_spec(document).get("containers"))), {})


def environment(documents: Documents, document: Document) -> dict[str, str]:
    """The variables of the pod, as far as the documents tell; secrets are HIDDEN.

    As in Kubernetes, a variable of its own beats one of a whole ConfigMap.
    """
    container = container_of(document)
    found: dict[str, str] = {}
    for each in items(container.get("envFrom")):
        prefix = str(each.get("prefix") or "")
        for kind, where in ((CONFIG_MAP, "configMapRef"), (SECRET, "secretRef")):
            named = documents.find(kind, at(each, where, "name"))
            for name, value in (data_of(named) if named else {}).items():
                found[prefix + name] = HIDDEN if kind == SECRET else value
    for each in items(container.get("env")):
        own = _value(documents, each)
        if own is not None:
            found[str(each.get("name"))] = own
    return found


def _value(documents: Documents, variable: Document) -> str | None:
    origin = variable.get("valueFrom")
    if not isinstance(origin, Mapping):
        return str(variable.get("value") or "")
    if "secretKeyRef" in origin:
        return HIDDEN
    named = documents.find(CONFIG_MAP, at(origin, "configMapKeyRef", "name"))
    return data_of(named).get(at(origin, "configMapKeyRef", "key")) if named else None


def data_of(document: Document) -> dict[str, str]:
    """What a ConfigMap or Secret holds; of a Secret never the values."""
    both = (document.get("data"), document.get("stringData"))
    held = [each for each in both if isinstance(each, Mapping)]
    return {
        str(name): str(value or "") for part in held for name, value in part.items()
    }


def references_of_pod(document: Document) -> Iterator[Reference]:
    """Every Secret and ConfigMap without which the pod doesn't start or lacks a file.

    What is marked optional is left out.
    """
    yield from references_of_environment(document)
    for volume in items(pod_spec(document).get("volumes")):
        origin = f"{subject_of(document)} volume {volume.get('name')}"
        for part in (volume, *items(at(volume, "projected", "sources"))):
            for kind, keys in _volume_parts(part):
                yield from _reference(kind, keys, origin)


def references_of_environment(document: Document) -> Iterator[Reference]:
    """What the pod's variables come from."""
    subject = subject_of(document)
    container = container_of(document)
    for each in items(container.get("envFrom")):
        yield from _reference(CONFIG_MAP, each.get("configMapRef"), subject)
        yield from _reference(SECRET, each.get("secretRef"), subject)
    for each in items(container.get("env")):
        origin = f"{subject} {each.get('name')}"
        value = each.get("valueFrom")
        yield from _reference(CONFIG_MAP, at(value, "configMapKeyRef"), origin)
        yield from _reference(SECRET, at(value, "secretKeyRef"), origin)


def _volume_parts(part: Document) -> Iterator[tuple[str, Document]]:
    """A volume's Secret or ConfigMap; with one mapping for each key that it names."""
    for kind, where in ((SECRET, "secret"), (CONFIG_MAP, "configMap")):
        held = part.get(where)
        if isinstance(held, Mapping):
            name = held.get("secretName") or held.get("name")
            base = {"name": name, "optional": held.get("optional")}
            keys = [each.get("key") for each in items(held.get("items"))]
            yield from ((kind, {**base, "key": key}) for key in keys or [None])


def _reference(kind: str, selector: object, needed_by: str) -> Iterator[Reference]:
    if isinstance(selector, Mapping) and not selector.get("optional"):
        key = selector.get("key")
        yield Reference(
            kind,
            str(selector.get("name") or ""),
            None if key is None else str(key),
            needed_by,
        )


def mounted(document: Document, path: str) -> Reference | None:
    """The key that a file of the pod is; None when nothing is mounted there."""
    for part, file in _parts_at(document, path):
        for kind, where in ((SECRET, "secret"), (CONFIG_MAP, "configMap")):
            key = _key_of_file(part.get(where), file)
            if key is not None:
                held = part[where]
                name = str(held.get("secretName") or held.get("name") or "")
                return Reference(kind, name, key, f"{subject_of(document)} {path}")
    return None


def is_own_token(document: Document, path: str) -> bool:
    """Whether the kubelet writes a token of the pod's own account to this file."""
    return any(
        at(part, "serviceAccountToken", "path") == file
        for part, file in _parts_at(document, path)
    )


def _parts_at(document: Document, path: str) -> Iterator[tuple[Document, str]]:
    """What is mounted above a path, and the path below it."""
    volumes = {
        str(each.get("name")): each for each in items(pod_spec(document).get("volumes"))
    }
    for mount in items(container_of(document).get("volumeMounts")):
        below = str(mount.get("mountPath") or "").rstrip("/") + "/"
        if path.startswith(below):
            volume = volumes.get(str(mount.get("name"))) or {}
            for part in (volume, *items(at(volume, "projected", "sources"))):
                yield part, path.removeprefix(below)


def _key_of_file(held: object, file: str) -> str | None:
    if not isinstance(held, Mapping):
        return None
    named = items(held.get("items"))
    if not named:
        return file
    return next((str(e.get("key")) for e in named if e.get("path") == file), None)


# -- Kafka --------------------------------------------------------------------------

_NET: Final = (
    ("sasl", "type"),
    ("sasl", "user"),
    ("sasl", "password"),
    ("tls", "caCert"),
    ("tls", "cert"),
    ("tls", "key"),
)


def references_of_net(document: Document) -> Iterator[Reference]:
    """The keys with which a KafkaSource proves who it is, and whom it trusts."""
    for part, name in _NET:
        selector = at(document, "spec", "net", part, name, "secretKeyRef")
        # Of a part that isn't enabled nothing is read.
        if at(document, "spec", "net", part, "enable") is True:
            yield from _reference(
                SECRET, selector, f"{subject_of(document)} net.{part}.{name}"
            )


def references_of_sink(document: Document) -> Iterator[Reference]:
    """The Secret with which a KafkaSink authenticates, and the key that says how."""
    name = at(document, "spec", "auth", "secret", "ref", "name")
    if name:
        where = f"{subject_of(document)} auth"
        yield Reference(SECRET, str(name), "protocol", where)


def references_of_trigger(document: Document) -> Iterator[Reference]:
    """The keys of a TriggerAuthentication."""
    for kind, part in ((SECRET, "secretTargetRef"), (CONFIG_MAP, "configMapTargetRef")):
        for each in items(at(document, "spec", part)):
            where = f"{subject_of(document)} {each.get('parameter')}"
            yield from _reference(kind, each, where)


def namespace_of_kafka(source: Document | None) -> str:
    """The namespace in the bootstrap servers' address; empty when it has none."""
    servers = texts(at(source, "spec", "bootstrapServers"))
    host = next(iter(servers), "").partition(":")[0].split(".")
    is_service = len(host) > 2 and host[2] == "svc"  # noqa: PLR2004
    return host[1] if is_service else ""


def references(parts: Parts) -> Iterator[Reference]:
    """Every Secret and ConfigMap that the parts need."""
    documents = parts.documents
    for pod in (*parts.pods, *documents.of_kind(CRON_JOB), *documents.of_kind(JOB)):
        yield from references_of_pod(pod)
    if parts.dead_letter_sink is not None:
        yield from references_of_sink(parts.dead_letter_sink)
    if parts.source is not None:
        yield from references_of_net(parts.source)
    for each in documents.of_kind(TRIGGER_AUTHENTICATION):
        yield from references_of_trigger(each)
