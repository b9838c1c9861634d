"""Whether the KafkaSource keeps order and records as the design demands.

Owns what a source must be so that no record is lost or overtaken; must never read
anything itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from function.doctor import documents as kinds
from function.doctor.diagnosis import Diagnosis, error, ok, skipped, unknown, warning
from function.doctor.documents import Document, Parts, at, number, subject_of
from function.durations import iso_s, shown

#: With more, the dispatcher's arithmetic for `max.poll.interval.ms` overflows and the
#: source never consumes.
_EXPONENTIAL_RETRIES_MAX: Final = 40
_SCRAM: Final = frozenset({"SCRAM-SHA-256", "SCRAM-SHA-512"})
_DELIVERY_TODO: Final = (
    "set delivery: retry, backoffPolicy: linear, backoffDelay, timeout, deadLetterSink"
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the source does about an answer that isn't 2xx; seconds."""

    retries: int
    #: The sum of all pauses, if every try fails at once.
    budget_s: float
    #: Before the last try.
    longest_pause_s: float
    timeout_s: float | None

    @classmethod
    def of(cls, source: Document) -> "Delivery | None":
        """The arithmetic of Knative's dispatcher; None when a value can't be read.

        Linear: D * n before the n-th retry; exponential: D * 2^n; no upper bound.
        """
        stanza = at(source, "spec", "delivery")
        retries = number(at(stanza, "retry") or 0)
        # Knative's own default where there are retries and nothing is said.
        delay = iso_s(at(stanza, "backoffDelay") or "PT0.2S")
        if retries is None or delay is None or not 0 <= retries < 1_000_000:  # noqa: PLR2004
            return None
        count = int(retries)
        timeout = iso_s(at(stanza, "timeout"))
        if at(stanza, "backoffPolicy") == "linear":
            return cls(count, delay * count * (count + 1) / 2, delay * count, timeout)
        if count > _EXPONENTIAL_RETRIES_MAX:
            return cls(count, float("inf"), float("inf"), timeout)
        return cls(count, delay * 2 * (2.0**count - 1), delay * 2.0**count, timeout)


#: How a key begins that Java and the KafkaSource can read.
_PKCS8: Final = "PRIVATE KEY"


def check_source(parts: Parts, topic_retention_s: float) -> Iterator[Diagnosis]:
    """Everything about the KafkaSource itself.

    Args:
        parts: what was read.
        topic_retention_s: how long the topic keeps a record; the retries must outlast
            it, or an outage dead-letters what could still have been delivered.

    """
    source = parts.source
    if source is None:
        if parts.documents.is_readable(kinds.KAFKA_SOURCE):
            yield error(
                f"KafkaSource/{kinds.SOURCE_NAME}",
                f"there is none in namespace {parts.documents.namespace}, or several "
                "and none of this name",
                "apply the manifests, or say --namespace",
            )
        return
    yield from _state(parts, source)
    yield from _order(source)
    yield from _delivery(parts, source, topic_retention_s)
    yield from _credentials(parts, source)
    yield from _topic(source)
    yield from _audience(parts, source)


def _state(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    yield from is_ready(parts, source)
    if at(source, "metadata", "deletionTimestamp"):
        yield error(
            subject_of(source),
            "is being deleted, which deletes the group's offsets",
            "see RUNBOOK before anything is applied again",
        )


def is_ready(parts: Parts, document: Document) -> Iterator[Diagnosis]:
    """Whether the controller says that the newest version works."""
    subject = subject_of(document)
    if not parts.documents.is_live:
        yield skipped(subject, "whether it is Ready, only a cluster can tell")
        return
    ready = kinds.condition(document, "Ready")
    seen = number(at(document, "status", "observedGeneration"))
    newest = number(at(document, "metadata", "generation"))
    if ready is None or ready.get("status") != "True":
        why = [str(at(ready, part) or "") for part in ("reason", "message")]
        told = ": ".join(each for each in why if each) or "no controller has said why"
        yield error(
            subject,
            f"is not Ready ({told})",
            f"kubectl describe {str(document.get('kind')).lower()} "
            f"{kinds.name_of(document)}",
        )
    elif seen is not None and newest is not None and seen < newest:
        yield warning(
            subject,
            "its controller has not yet seen the newest version",
            "wait, or look at the controller",
        )
    else:
        yield ok(subject, "is Ready")


def _order(source: Document) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    spec = at(source, "spec")
    if at(spec, "ordering") not in (None, "ordered"):
        yield error(
            subject,
            f"ordering is {at(spec, 'ordering')}: a subscriber's orders overtake "
            "each other",
            "set ordering: ordered",
        )
    else:
        yield ok(subject, "delivers in order, one record of a partition at a time")
    if at(spec, "initialOffset") != "earliest":
        yield error(
            subject,
            f"initialOffset is {at(spec, 'initialOffset') or 'latest by default'}: "
            "what was produced before the first commit is skipped",
            "set initialOffset: earliest; the ledger recognises what comes again",
        )
    group = str(at(spec, "consumerGroup") or "")
    if not group or group.startswith("knative-kafka-source-"):
        yield error(
            subject,
            "its consumerGroup is made up: made anew, the source would begin anew",
            "set consumerGroup, which can't be changed later",
        )
    keys = at(source, "metadata", "labels", "kafkasources.sources.knative.dev/key-type")
    if keys not in (None, "string"):
        yield error(
            subject,
            f"reads keys as {keys}: a number in E.164 is a string",
            "remove the label kafkasources.sources.knative.dev/key-type",
        )


def _delivery(
    parts: Parts, source: Document, topic_retention_s: float
) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    stanza = at(source, "spec", "delivery")
    if stanza is None:
        yield error(
            subject,
            "has no delivery: ten tries in ten minutes, then the record is lost",
            _DELIVERY_TODO,
        )
        return
    delivery = Delivery.of(source)
    if delivery is None:
        yield error(
            subject,
            "delivery.retry or delivery.backoffDelay can't be read",
            "retry is a whole number, backoffDelay such as PT1S",
        )
        return
    yield from _retries(subject, stanza, delivery, topic_retention_s)
    if delivery.timeout_s is None or delivery.timeout_s <= 0:
        yield error(
            subject,
            "delivery.timeout is missing or can't be read: a hanging function would "
            "be waited for ten minutes",
            "set delivery.timeout to EVENT_DELIVERY_TIMEOUT_S, such as PT60S",
        )
    if at(stanza, "retryAfterMax") is not None:
        yield error(
            subject,
            "delivery.retryAfterMax is not understood by the dispatcher, and refused "
            "by a stock cluster",
            "remove it",
        )
    yield from _dead_letters(parts, source)


def _retries(
    subject: str, stanza: Document, delivery: Delivery, topic_retention_s: float
) -> Iterator[Diagnosis]:
    if delivery.retries == 0:
        yield error(
            subject,
            "delivery.retry is missing or 0: the first 503 dead-letters a good order",
            _DELIVERY_TODO,
        )
        return
    if stanza.get("backoffPolicy") != "linear":
        if delivery.retries > _EXPONENTIAL_RETRIES_MAX:
            yield error(
                subject,
                f"{delivery.retries} exponential retries overflow the dispatcher's "
                "arithmetic: it never consumes",
                "set backoffPolicy: linear",
            )
            return
        yield warning(
            subject,
            f"the backoff is exponential: it ends in a pause of "
            f"{shown(delivery.longest_pause_s)}",
            "set backoffPolicy: linear",
        )
    if delivery.longest_pause_s < 0.001:  # noqa: PLR2004
        yield error(
            subject,
            "delivery.backoffDelay is 0, with which the dispatcher never tries again",
            "set backoffDelay: PT1S",
        )
    elif delivery.budget_s < topic_retention_s:
        yield error(
            subject,
            f"its {delivery.retries} retries end after {shown(delivery.budget_s)}, "
            f"the topic keeps a record for {shown(topic_retention_s)}: a longer "
            "outage dead-letters good orders",
            "raise delivery.retry or backoffDelay",
        )
    else:
        yield ok(
            subject,
            f"its {delivery.retries} retries last {shown(delivery.budget_s)}, longer "
            f"than the topic keeps a record ({shown(topic_retention_s)})",
        )


def _dead_letters(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    sink = at(source, "spec", "delivery", "deadLetterSink")
    reference = at(sink, "ref")
    if not at(reference, "name") and not at(sink, "uri"):
        yield error(
            subject,
            "has no deadLetterSink: what the function refuses is gone, its offset "
            "committed",
            "set delivery.deadLetterSink",
        )
    elif parts.dead_letter_sink is not None:
        yield from is_ready(parts, parts.dead_letter_sink)
        if at(parts.dead_letter_sink, "spec", "topic") in kinds.topics_of(source):
            yield error(
                subject_of(parts.dead_letter_sink),
                "writes dead letters into the topic of orders: they go in circles",
                "give dead letters a topic of their own",
            )
    elif reference is not None and kinds.kind_of(reference) == kinds.KAFKA_SINK:
        if not parts.documents.is_live:
            yield skipped(
                f"KafkaSink/{reference.get('name')}", "is not among the documents"
            )
        elif parts.documents.is_readable(kinds.KAFKA_SINK):
            yield error(
                f"KafkaSink/{reference.get('name')}",
                "the dead letter sink does not exist",
                "apply it before the source",
            )


def _topic(source: Document) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    topics = kinds.topics_of(source)
    if len(topics) != 1:
        yield error(
            subject,
            f"reads {len(topics)} topics: places in the line are kept by one topic's "
            "partitions and offsets",
            "name one topic; another gets a source of its own",
        )
        return
    told = at(source, "spec", "ceOverrides", "extensions", "topic")
    if told is None:
        yield warning(
            subject,
            "an order that is a CloudEvent doesn't say which topic it comes from",
            f"set ceOverrides.extensions.topic: {topics[0]}",
        )
    elif told != topics[0]:
        yield error(
            subject,
            f"tells the function that its topic is {told}, but reads {topics[0]}",
            f"set ceOverrides.extensions.topic: {topics[0]}",
        )


def _credentials(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    net = at(source, "spec", "net")
    is_tls = at(net, "tls", "enable") is True
    is_sasl = at(net, "sasl", "enable") is True
    if not is_tls:
        yield error(
            subject,
            "talks to Kafka in plain text",
            "set net.tls.enable: true and net.tls.caCert",
        )
    if is_sasl:
        yield from _mechanism(parts, source)
    elif not (at(net, "tls", "cert") and at(net, "tls", "key")):
        yield error(
            subject,
            "has neither SASL nor a client certificate: Kafka can't know who it is",
            "set net.sasl, or net.tls.cert and net.tls.key",
        )
    else:
        yield from _client_key(parts, source)
    if is_tls and at(net, "tls", "caCert") is None:
        yield warning(
            subject,
            "trusts every public CA, since net.tls.caCert is missing",
            "set net.tls.caCert to the cluster's own CA",
        )


def _secret_value(parts: Parts, selector: object) -> str | None:
    """What may be known of a secret's value; None when it isn't there."""
    reference = at(selector, "secretKeyRef")
    secret = parts.documents.find(kinds.SECRET, at(reference, "name"))
    key = at(reference, "key")
    return None if secret is None else kinds.data_of(secret).get(str(key))


def _mechanism(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    subject = subject_of(source)
    selector = at(source, "spec", "net", "sasl", "type")
    if selector is None:
        yield error(
            subject,
            "net.sasl.type is missing, which means PLAIN",
            "refer to a key that holds SCRAM-SHA-512",
        )
        return
    value = _secret_value(parts, selector)
    if value and value not in _SCRAM:
        shown_ = value if value != kinds.HIDDEN else "no mechanism's name"
        yield error(
            subject,
            f"its SASL mechanism is {shown_}",
            "the key that net.sasl.type names must hold SCRAM-SHA-512, and nothing "
            "else",
        )
    elif value:
        yield ok(subject, f"authenticates by {value} over TLS")


def _client_key(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    value = _secret_value(parts, at(source, "spec", "net", "tls", "key"))
    if value and value != f"-----BEGIN {_PKCS8}-----":
        yield error(
            subject_of(source),
            "its client key is not in PKCS#8, which the source refuses",
            "openssl pkcs8 -topk8 -nocrypt; cert-manager: privateKey.encoding: PKCS8",
        )
    elif value:
        yield ok(subject_of(source), "authenticates by a client certificate")


def _audience(parts: Parts, source: Document) -> Iterator[Diagnosis]:
    """With an audience but without the feature, every record is dropped at once."""
    if at(source, "spec", "sink", "audience") is None:
        return
    subject = subject_of(source)
    documents = parts.documents
    features = documents.find(
        kinds.CONFIG_MAP, kinds.FEATURES, kinds.EVENTING_NAMESPACE
    )
    if not documents.is_live:
        yield skipped(subject, "whether authentication-oidc is on: a cluster tells")
    elif features is not None:
        state = kinds.data_of(features).get("authentication-oidc", "disabled")
        if state.lower() != "enabled":
            yield error(
                subject,
                "sink.audience is set, but authentication-oidc is off: every record "
                "fails without a retry",
                f"enable it in {kinds.EVENTING_NAMESPACE}/{kinds.FEATURES}, or remove "
                "the audience",
            )
    elif documents.is_readable(kinds.CONFIG_MAP, kinds.FEATURES):
        yield unknown(
            subject,
            f"{kinds.EVENTING_NAMESPACE}/{kinds.FEATURES} is not there, which says "
            "whether authentication-oidc is on",
            "is Knative Eventing installed in another namespace?",
        )
