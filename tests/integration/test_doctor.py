"""`topup doctor` against a server that speaks the Kubernetes API: one fault a time."""

import copy
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from function.cli import main
from function.doctor.cluster import read_offline
from function.doctor.diagnosis import Severity
from function.doctor.documents import Documents, parts_of
from function.doctor.examination import examine
from function.doctor.scaling import TRIGGER_WORDS
from tests.kubernetes_api import (
    Document,
    KubernetesApi,
    running_kubernetes_api,
    write_kubeconfig,
)

HEALTHY: Final = Path(__file__).parents[1] / "healthy_cluster.yaml"
NO_SERVICES: Final = {"ledger", "recharge API"}


def healthy() -> list[Document]:
    return list(yaml.safe_load_all(HEALTHY.read_text("utf-8")))


@dataclass
class Cluster:
    """A running API server, and the doctor who visits it."""

    api: KubernetesApi
    kubeconfig: Path

    def object(self, name: str) -> Document:
        """`Kind/name` of what the server has."""
        kind, _, own = name.partition("/")
        (found,) = [
            each
            for each in self.api.documents
            if (each["kind"], each["metadata"]["name"]) == (kind, own)
        ]
        return found

    def remove(self, name: str) -> None:
        self.api.documents.remove(self.object(name))

    def doctor(self, *words: str, **env: str) -> Result:
        command = ["doctor", "--kubeconfig", str(self.kubeconfig), *words]
        return CliRunner(env=env).invoke(main, command)

    def found(self, *words: str) -> list[dict[str, str]]:
        """What it says of the cluster; the services are other tests'."""
        result = self.doctor("--json", *words)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        every = json.loads(result.stdout)["diagnoses"]
        return [each for each in every if each["subject"] not in NO_SERVICES]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_kubernetes_api(tmp_path, healthy()) as (api, kubeconfig):
        yield Cluster(api, kubeconfig)


def bad(found: list[dict[str, str]]) -> list[dict[str, str]]:
    return [each for each in found if each["severity"] not in {"ok", "skipped"}]


def test_healthy_cluster_has_nothing_to_complain_about(cluster: Cluster) -> None:
    found = cluster.found()

    assert bad(found) == []
    assert {each["severity"] for each in found} == {"ok"}
    assert len(found) >= 20
    assert all(asked.startswith("GET ") for asked in cluster.api.asked)


def test_secrets_are_asked_for_by_name_and_never_shown(cluster: Cluster) -> None:
    for each in cluster.api.documents:
        if each["kind"] == "Secret":
            each["stringData"] = dict.fromkeys(each["stringData"], "hunter2")

    result = cluster.doctor("--json")

    assert "hunter2" not in result.output
    assert "aHVudGVyMg" not in result.output
    secrets = [each for each in cluster.api.asked if "/secrets" in each]
    assert secrets
    assert not any(each.endswith("/secrets") for each in secrets)


# -- One fault at a time ------------------------------------------------------------

SOURCE: Final = "KafkaSource/topup-source"
FUNCTION: Final = "Service/topup-function"
RESOLVER: Final = "Deployment/topup-resolver"
SCALED: Final = "ScaledObject/topup-source"
TOPIC: Final = "KafkaTopic/topup-requests"


def at(document: Document, path: str) -> tuple[Any, Any]:
    """The holder and the last name of a dotted path; `/` stands for a dot in a name."""
    *way, last = (each.replace("/", ".") for each in path.split("."))
    holder: Any = document
    for name in way:
        holder = holder[int(name) if isinstance(holder, list) else name]
    return holder, int(last) if isinstance(holder, list) else last


def put(name: str, path: str, value: Any) -> Callable[[Cluster], None]:
    def break_it(cluster: Cluster) -> None:
        holder, last = at(cluster.object(name), path)
        holder[last] = value

    return break_it


def drop(name: str, path: str) -> Callable[[Cluster], None]:
    def break_it(cluster: Cluster) -> None:
        holder, last = at(cluster.object(name), path)
        del holder[last]

    return break_it


def gone(name: str) -> Callable[[Cluster], None]:
    return lambda cluster: cluster.remove(name)


def setting(name: str, value: str) -> Callable[[Cluster], None]:
    def break_it(cluster: Cluster) -> None:
        cluster.object("ConfigMap/topup-settings")["data"][name] = value

    return break_it


def not_served(api: str, resource: str = "") -> Callable[[Cluster], None]:
    def break_it(cluster: Cluster) -> None:
        if resource:
            del cluster.api.served[api][resource]
        else:
            del cluster.api.served[api]

    return break_it


def another(name: str, **changes: Any) -> Callable[[Cluster], None]:
    """A second object like the first one, under another name."""

    def break_it(cluster: Cluster) -> None:
        second = copy.deepcopy(cluster.object(name))
        second["metadata"] = {"name": "another", "namespace": "topup"}
        second["spec"] |= changes
        cluster.api.documents.append(second)

    return break_it


def both(*faults: Callable[[Cluster], None]) -> Callable[[Cluster], None]:
    def break_it(cluster: Cluster) -> None:
        for fault in faults:
            fault(cluster)

    return break_it


NOT_READY: Final = [
    {"type": "Ready", "status": "False", "reason": "NoSink", "message": "no sink"}
]
SERVICE_TARGET: Final = {
    "apiVersion": "serving.knative.dev/v1",
    "kind": "Service",
    "name": "topup-function",
}
REVISION_TARGET: Final = {"kind": "Deployment", "name": "topup-function-00001"}
FEATURE: Final = "ConfigMap/config-kafka-features"
CLASS: Final = "metadata.annotations.autoscaling/eventing/knative/dev\x00class"

#: id -> (fault, severity, subject, a part of the message).
FAULTS: Final[Mapping[str, tuple[Callable[[Cluster], None], str, str, str]]] = {
    # What the cluster serves.
    "no kafka source CRD": (
        both(not_served("sources.knative.dev/v1"), gone(SOURCE)),
        "error",
        "sources.knative.dev/v1",
        "does not serve kafkasources",
    ),
    "no scale subresource": (
        not_served("sources.knative.dev/v1", "kafkasources/scale"),
        "error",
        "sources.knative.dev/v1",
        "does not serve kafkasources/scale",
    ),
    "no keda": (
        both(not_served("keda.sh/v1alpha1"), gone(SCALED)),
        "error",
        "keda.sh/v1alpha1",
        "does not serve scaledobjects",
    ),
    "no serving": (
        not_served("serving.knative.dev/v1"),
        "error",
        "serving.knative.dev/v1",
        "does not serve services",
    ),
    "no kafka sink CRD": (
        not_served("eventing.knative.dev/v1alpha1"),
        "error",
        "eventing.knative.dev/v1alpha1",
        "does not serve kafkasinks",
    ),
    # The KafkaSource.
    "no source": (gone(SOURCE), "error", SOURCE, "there is none"),
    "source not ready": (
        put(SOURCE, "status.conditions", NOT_READY),
        "error",
        SOURCE,
        "not Ready (NoSink: no sink)",
    ),
    "source never reconciled": (drop(SOURCE, "status"), "error", SOURCE, "not Ready"),
    "source not yet seen": (
        put(SOURCE, "metadata.generation", 4),
        "warning",
        SOURCE,
        "not yet seen",
    ),
    "source being deleted": (
        put(SOURCE, "metadata.deletionTimestamp", "2026-11-23T10:00:00Z"),
        "error",
        SOURCE,
        "being deleted",
    ),
    "unordered": (
        put(SOURCE, "spec.ordering", "unordered"),
        "error",
        SOURCE,
        "overtake",
    ),
    "latest": (drop(SOURCE, "spec.initialOffset"), "error", SOURCE, "latest by defa"),
    "made up group": (
        put(SOURCE, "spec.consumerGroup", "knative-kafka-source-1"),
        "error",
        SOURCE,
        "made up",
    ),
    "keys as integers": (
        put(
            SOURCE,
            "metadata.labels",
            {"kafkasources.sources.knative.dev/key-type": "int"},
        ),
        "error",
        SOURCE,
        "reads keys as int",
    ),
    "no delivery": (drop(SOURCE, "spec.delivery"), "error", SOURCE, "no delivery"),
    "no retry": (
        drop(SOURCE, "spec.delivery.retry"),
        "error",
        SOURCE,
        "delivery.retry is missing",
    ),
    "unreadable backoff": (
        put(SOURCE, "spec.delivery.backoffDelay", "1s"),
        "error",
        SOURCE,
        "can't be read",
    ),
    "backoff of nothing": (
        put(SOURCE, "spec.delivery.backoffDelay", "PT0S"),
        "error",
        SOURCE,
        "backoffDelay is 0",
    ),
    "exponential": (
        both(
            put(SOURCE, "spec.delivery.backoffPolicy", "exponential"),
            put(SOURCE, "spec.delivery.retry", 20),
            setting("EVENT_REDELIVERY_MAX_S", "2000000"),
        ),
        "warning",
        SOURCE,
        "exponential",
    ),
    "exponential overflow": (
        both(
            drop(SOURCE, "spec.delivery.backoffPolicy"),
            put(SOURCE, "spec.delivery.retry", 49),
        ),
        "error",
        SOURCE,
        "overflow",
    ),
    "short budget": (
        put(SOURCE, "spec.delivery.retry", 10),
        "error",
        SOURCE,
        "10 retries end after 55 s",
    ),
    "no delivery timeout": (
        drop(SOURCE, "spec.delivery.timeout"),
        "error",
        SOURCE,
        "delivery.timeout is missing",
    ),
    "retry after": (
        put(SOURCE, "spec.delivery.retryAfterMax", "PT30S"),
        "error",
        SOURCE,
        "retryAfterMax",
    ),
    "no dead letter sink": (
        drop(SOURCE, "spec.delivery.deadLetterSink"),
        "error",
        SOURCE,
        "no deadLetterSink",
    ),
    "dead letter sink that isn't there": (
        gone("KafkaSink/topup-dead-letters"),
        "error",
        "KafkaSink/topup-dead-letters",
        "does not exist",
    ),
    "dead letter sink not ready": (
        put("KafkaSink/topup-dead-letters", "status.conditions", NOT_READY),
        "error",
        "KafkaSink/topup-dead-letters",
        "not Ready",
    ),
    "dead letters in circles": (
        put("KafkaSink/topup-dead-letters", "spec.topic", "topup-requests"),
        "error",
        "KafkaSink/topup-dead-letters",
        "in circles",
    ),
    "two topics": (
        put(SOURCE, "spec.topics", ["topup-requests", "b"]),
        "error",
        SOURCE,
        "reads 2 topics",
    ),
    "no topic extension": (
        drop(SOURCE, "spec.ceOverrides"),
        "warning",
        SOURCE,
        "which topic",
    ),
    "wrong topic extension": (
        put(SOURCE, "spec.ceOverrides.extensions.topic", "orders"),
        "error",
        SOURCE,
        "tells the function that its topic is orders",
    ),
    "plain text": (
        put(SOURCE, "spec.net.tls.enable", value=False),
        "error",
        SOURCE,
        "in plain text",
    ),
    "public CAs": (
        drop(SOURCE, "spec.net.tls.caCert"),
        "warning",
        SOURCE,
        "every public CA",
    ),
    "nobody": (
        put(SOURCE, "spec.net.sasl.enable", value=False),
        "error",
        SOURCE,
        "neither SASL nor",
    ),
    "plain mechanism by default": (
        drop(SOURCE, "spec.net.sasl.type"),
        "error",
        SOURCE,
        "which means PLAIN",
    ),
    "plain mechanism": (
        put("Secret/topup-source-kafka", "stringData.sasl/mechanism", "PLAIN"),
        "error",
        SOURCE,
        "mechanism is PLAIN",
    ),
    "KEDA's spelling of the mechanism": (
        put("Secret/topup-source-kafka", "stringData.sasl/mechanism", "scram_sha512"),
        "error",
        SOURCE,
        "no mechanism's name",
    ),
    "audience without the feature": (
        put(SOURCE, "spec.sink.audience", "topup"),
        "error",
        SOURCE,
        "authentication-oidc is off",
    ),
    "audience, and nobody knows the feature": (
        both(
            put(SOURCE, "spec.sink.audience", "topup"),
            gone("ConfigMap/config-features"),
        ),
        "unknown",
        SOURCE,
        "whether authentication-oidc is on",
    ),
    # Secrets and settings.
    "missing secret": (
        gone("Secret/topup-recharge-api"),
        "error",
        "Secret/topup-recharge-api",
        "does not exist",
    ),
    "missing key": (
        drop("Secret/topup-function-database", "stringData.ca/crt"),
        "error",
        "Secret/topup-function-database",
        "has no key ca.crt",
    ),
    "empty key": (
        put("Secret/topup-source-kafka", "stringData.password", " "),
        "error",
        "Secret/topup-source-kafka",
        "password is empty",
    ),
    "missing key of KEDA": (
        drop("Secret/topup-keda-kafka", "stringData.password"),
        "error",
        "Secret/topup-keda-kafka",
        "has no key password",
    ),
    "missing key of the sink": (
        drop("Secret/topup-dead-letters-kafka", "stringData.protocol"),
        "error",
        "Secret/topup-dead-letters-kafka",
        "has no key protocol",
    ),
    "missing settings": (
        gone("ConfigMap/topup-settings"),
        "error",
        "ConfigMap/topup-settings",
        "does not exist",
    ),
    "file that nothing mounts": (
        put(
            FUNCTION,
            "spec.template.spec.containers.0.env.1.value",
            "/secrets/elsewhere/password",
        ),
        "error",
        FUNCTION,
        "where nothing is mounted",
    ),
    "mistyped setting": (
        setting("LEDGER_LEASES", "30"),
        "warning",
        FUNCTION,
        "LEDGER_LEASES is no setting",
    ),
    "required setting": (
        drop("ConfigMap/topup-settings", "data.RECHARGE_API_URL"),
        "error",
        FUNCTION,
        "RECHARGE_API_URL is missing",
    ),
    "deadlines in the settings": (
        setting("LEDGER_LEASE_MARGIN_S", "50"),
        "error",
        FUNCTION,
        "LEDGER_LEASE_MARGIN_S (65) must be less than EVENT_DELIVERY_TIMEOUT_S (60)",
    ),
    "resolver with settings of its own": (
        put(
            RESOLVER,
            "spec.template.spec.containers.0.env",
            [{"name": "RECHARGE_API_KIND", "value": "lookup"}],
        ),
        "error",
        RESOLVER,
        "RECHARGE_API_KIND is lookup, in the function refuse",
    ),
    # Deadlines across objects.
    "delivery shorter than the lease": (
        put(SOURCE, "spec.delivery.timeout", "PT20S"),
        "error",
        FUNCTION,
        "LEDGER_LEASE_MARGIN_S (20 s) must be less than delivery.timeout",
    ),
    "delivery told otherwise": (
        put(SOURCE, "spec.delivery.timeout", "PT50S"),
        "warning",
        FUNCTION,
        "EVENT_DELIVERY_TIMEOUT_S says 60, but the object says 50",
    ),
    "revision shorter than the delivery": (
        put(FUNCTION, "spec.template.spec.timeoutSeconds", 55),
        "error",
        FUNCTION,
        "(60 s) must be less than timeoutSeconds of the Revision (55 s)",
    ),
    "revision that ends before it has drained": (
        both(
            put(FUNCTION, "spec.template.spec.timeoutSeconds", 65),
            setting("SERVER_GRACEFUL_TIMEOUT_S", "70"),
            setting("SERVER_TERMINATION_GRACE_S", "80"),
        ),
        "error",
        FUNCTION,
        "SERVER_GRACEFUL_TIMEOUT_S (70 s) must be less than timeoutSeconds",
    ),
    "resolver faster than the source": (
        setting("EVENT_REDELIVERY_MAX_S", "900"),
        "error",
        FUNCTION,
        "longest pause plus one delivery (1160 s)",
    ),
    # The function and the resolver.
    "no function": (
        gone(FUNCTION),
        "error",
        "topup-function",
        "does not exist in namespace topup",
    ),
    "function not ready": (
        put(FUNCTION, "status.conditions", NOT_READY),
        "error",
        FUNCTION,
        "not Ready",
    ),
    "open to the world": (
        drop(FUNCTION, "metadata.labels"),
        "error",
        FUNCTION,
        "from outside the cluster",
    ),
    "more at once than threads": (
        put(FUNCTION, "spec.template.spec.containerConcurrency", 20),
        "error",
        FUNCTION,
        "containerConcurrency is 20",
    ),
    "no limit at once": (
        put(FUNCTION, "spec.template.spec.containerConcurrency", 0),
        "error",
        FUNCTION,
        "(no limit)",
    ),
    "no pod at all": (
        put(
            FUNCTION,
            "spec.template.metadata.annotations",
            {"autoscaling.knative.dev/max-scale": "3"},
        ),
        "warning",
        FUNCTION,
        "scaled to no pod",
    ),
    "any number of pods": (
        put(
            FUNCTION,
            "spec.template.metadata.annotations",
            {"autoscaling.knative.dev/min-scale": "1"},
        ),
        "warning",
        FUNCTION,
        "no upper bound",
    ),
    "too few pods": (
        put(
            FUNCTION,
            "spec.template.metadata.annotations",
            {
                "autoscaling.knative.dev/minScale": "1",
                "autoscaling.knative.dev/maxScale": "1",
            },
        ),
        "warning",
        FUNCTION,
        "serve 8 of 12 partitions",
    ),
    "no resolver": (gone(RESOLVER), "error", "topup-resolver", "does not exist"),
    "dead resolver": (
        put(RESOLVER, "status", {}),
        "error",
        RESOLVER,
        "no pod that is available",
    ),
    # Scaling.
    "nothing scales": (gone(SCALED), "warning", "ScaledObject", "nothing scales"),
    "two scaled objects": (
        another(SCALED),
        "error",
        "ScaledObject/topup-source, ScaledObject/another",
        "two scalers",
    ),
    "knative's own scaled object beside ours": (
        another(SCALED, scaleTargetRef={"kind": "ConsumerGroup", "name": "6c1f"}),
        "error",
        "ScaledObject/topup-source, ScaledObject/another",
        "two scalers",
    ),
    "an autoscaler beside KEDA's": (
        another("HorizontalPodAutoscaler/keda-hpa-topup-source"),
        "error",
        "ScaledObject/topup-source, HorizontalPodAutoscaler/another",
        "two scalers",
    ),
    "built-in integration": (
        both(
            put(SOURCE, "metadata.annotations", {}),
            put(FEATURE, "data.controller-autoscaler-keda", "enabled"),
        ),
        "error",
        SOURCE,
        "Knative's own KEDA integration",
    ),
    "built-in integration, perhaps": (
        both(put(SOURCE, "metadata.annotations", {}), gone(FEATURE)),
        "unknown",
        SOURCE,
        "whether Knative scales it, too",
    ),
    "scaled object not ready": (
        put(SCALED, "status.conditions", NOT_READY),
        "error",
        SCALED,
        "not Ready",
    ),
    "paused": (
        put(SCALED, "metadata.annotations", {"autoscaling.keda.sh/paused": "true"}),
        "warning",
        SCALED,
        "is paused",
    ),
    "scales a Knative Service": (
        put(SCALED, "spec.scaleTargetRef", SERVICE_TARGET),
        "error",
        SCALED,
        "only Knative's own autoscaler",
    ),
    "scales a revision": (
        put(SCALED, "spec.scaleTargetRef", REVISION_TARGET),
        "error",
        SCALED,
        "only Knative's own autoscaler",
    ),
    "scales somebody else": (
        put(SCALED, "spec.scaleTargetRef.name", "other"),
        "error",
        SCALED,
        "not our KafkaSource",
    ),
    "watches our group for somebody else": (
        put(SCALED, "spec.scaleTargetRef", {"name": "other"}),
        "error",
        SCALED,
        "watches our group, but scales Deployment/other",
    ),
    "more than partitions": (
        put(SCALED, "spec.maxReplicaCount", 13),
        "error",
        SCALED,
        "the topic has 12 partitions",
    ),
    "a hundred by default": (
        drop(SCALED, "spec.maxReplicaCount"),
        "error",
        SCALED,
        "maxReplicaCount is 100",
    ),
    "fewer than partitions": (
        put(SCALED, "spec.maxReplicaCount", 6),
        "warning",
        SCALED,
        "maxReplicaCount is 6",
    ),
    "to nothing": (
        drop(SCALED, "spec.minReplicaCount"),
        "error",
        SCALED,
        "may scale to 0",
    ),
    "idle": (put(SCALED, "spec.idleReplicaCount", 0), "error", SCALED, "may scale to"),
    "no trigger": (put(SCALED, "spec.triggers", []), "error", SCALED, "0 kafka tri"),
    "another topic": (
        put(SCALED, "spec.triggers.0.metadata.topic", "orders"),
        "error",
        SCALED,
        "its topic is orders",
    ),
    "another group": (
        put(SCALED, "spec.triggers.0.metadata.consumerGroup", "g"),
        "error",
        SCALED,
        "its consumerGroup is g",
    ),
    "another cluster": (
        put(SCALED, "spec.triggers.0.metadata.bootstrapServers", "k:9092"),
        "warning",
        SCALED,
        "bootstrapServers are not the source's",
    ),
    "mistyped word of a trigger": (
        put(SCALED, "spec.triggers.0.metadata.lagTreshold", "5"),
        "error",
        SCALED,
        "lagTreshold is no word",
    ),
    "offset reset": (
        drop(SCALED, "spec.triggers.0.metadata.offsetResetPolicy"),
        "warning",
        SCALED,
        "offsetResetPolicy",
    ),
    "never wakes": (
        put(SCALED, "spec.triggers.0.metadata.scaleToZeroOnInvalidOffset", "true"),
        "error",
        SCALED,
        "never wakes",
    ),
    "idle consumers": (
        put(SCALED, "spec.triggers.0.metadata.allowIdleConsumers", "true"),
        "warning",
        SCALED,
        "allowIdleConsumers",
    ),
    "persistent lag": (
        both(
            put(SCALED, "spec.triggers.0.metadata.excludePersistentLag", "true"),
            put(SCALED, "spec.triggers.0.useCachedMetrics", value=False),
        ),
        "warning",
        SCALED,
        "excludePersistentLag",
    ),
    "unverified": (
        put(SCALED, "spec.triggers.0.metadata.unsafeSsl", "true"),
        "error",
        SCALED,
        "not verified",
    ),
    "KEDA in plain text": (
        drop(SCALED, "spec.triggers.0.metadata.tls"),
        "error",
        SCALED,
        "in plain text",
    ),
    "KEDA as nobody": (
        drop(SCALED, "spec.triggers.0.metadata.sasl"),
        "error",
        SCALED,
        "neither SASL nor",
    ),
    "Knative's spelling of the mechanism": (
        put(SCALED, "spec.triggers.0.metadata.sasl", "SCRAM-SHA-512"),
        "error",
        SCALED,
        "sasl is SCRAM-SHA-512",
    ),
    "no reference to authentication": (
        drop(SCALED, "spec.triggers.0.authenticationRef"),
        "error",
        SCALED,
        "no authenticationRef",
    ),
    "no authentication": (
        gone("TriggerAuthentication/topup-keda"),
        "error",
        "TriggerAuthentication/topup-keda",
        "does not exist",
    ),
    "no password for KEDA": (
        drop("TriggerAuthentication/topup-keda", "spec.secretTargetRef.1"),
        "error",
        "TriggerAuthentication/topup-keda",
        "no username and password",
    ),
    # Topics and retention.
    "no declared topic": (
        gone(TOPIC),
        "unknown",
        "topic topup-requests",
        "no KafkaTopic declares it",
    ),
    "compacted": (
        put(TOPIC, "spec.config.cleanup/policy", "compact,delete"),
        "error",
        TOPIC,
        "compacted",
    ),
    "one copy": (put(TOPIC, "spec.replicas", 1), "warning", TOPIC, "has 1 copies"),
    "one in sync": (
        drop(TOPIC, "spec.config.min/insync/replicas"),
        "error",
        TOPIC,
        "min.insync.replicas",
    ),
    "unclean": (
        put(TOPIC, "spec.config.unclean/leader/election/enable", value=True),
        "error",
        TOPIC,
        "unclean",
    ),
    "longer than told": (
        both(
            put(TOPIC, "spec.config.retention/ms", 605_000_000),
            put(SOURCE, "spec.delivery.retry", 1101),
            setting("EVENT_REDELIVERY_MAX_S", "1300"),
        ),
        "error",
        TOPIC,
        "TOPIC_RETENTION_S says 7 d",
    ),
    "dead letters for ever": (
        put("KafkaTopic/topup-dead-letters", "spec.config.retention/ms", -1),
        "error",
        "KafkaTopic/topup-dead-letters",
        "for ever",
    ),
    "purge too early": (
        put(
            "CronJob/topup-purge",
            "spec.jobTemplate.spec.template.spec.containers.0.command",
            ["topup", "purge", "--older-than=30d"],
        ),
        "error",
        "CronJob/topup-purge",
        "7 + 30 + 7 = 44 days",
    ),
    "purge of no age": (
        put(
            "CronJob/topup-purge",
            "spec.jobTemplate.spec.template.spec.containers.0.command",
            ["topup", "purge", "--older-than", "soon"],
        ),
        "error",
        "CronJob/topup-purge",
        "which is no age",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(cluster: Cluster, name: str) -> None:
    break_it, severity, subject, message = FAULTS[name]
    break_it(cluster)

    result = cluster.doctor("--json")

    found = json.loads(result.stdout)["diagnoses"]
    (told,) = [
        each
        for each in found
        if each["subject"] == subject and message in each["message"]
    ]
    assert told["severity"] == severity
    # Neither service is looked at here, so that the least is 3.
    assert result.exit_code == (1 if severity == "error" else 3)
    assert told["todo"]
    assert "\n" not in told["message"]


# -- What can't be read -------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "unread", "not_claimed"),
    [
        ("kafkasources", "KafkaSource.sources.knative.dev", SOURCE),
        ("scaledobjects", "ScaledObject.keda.sh", "ScaledObject"),
        (
            "secrets/topup-recharge-api",
            "Secret/topup-recharge-api",
            "does not exist",
        ),
        (
            "configmaps/config-kafka-features",
            "ConfigMap/config-kafka-features",
            "does not exist",
        ),
        ("deployments", "Deployment.apps", "topup-resolver"),
        ("kafkatopics", "KafkaTopic.kafka.strimzi.io", "topic topup-requests"),
        (
            "triggerauthentications",
            "TriggerAuthentication.keda.sh",
            "TriggerAuthentication/topup-keda",
        ),
        ("services", "Service.serving.knative.dev", "topup-function"),
        ("kafkasinks", "KafkaSink.eventing.knative.dev", "KafkaSink/topup-dead-le"),
    ],
)
def test_missing_right_is_told_and_nothing_is_claimed_missing(
    cluster: Cluster, refused: str, unread: str, not_claimed: str
) -> None:
    cluster.api.refused[refused] = 403

    found = cluster.found()

    # Topics are listed in two namespaces.
    told, *_ = [each for each in found if each["subject"] == unread]
    assert told["severity"] == "unknown"
    assert "forbidden" in told["message"]
    assert "grant the right" in told["todo"]
    assert not [
        each
        for each in found
        if each["severity"] == "error"
        and not_claimed in f"{each['subject']}: {each['message']}"
    ]


def test_failing_resource_is_told(cluster: Cluster) -> None:
    cluster.api.refused["scaledobjects"] = 503

    (told,) = [
        each for each in cluster.found() if each["subject"] == "ScaledObject.keda.sh"
    ]

    assert "answers 503" in told["message"]


def one_line(result: Result) -> dict[str, Any]:
    """What is told of a cluster that can't be talked to; beside it the services."""
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 3
    found = json.loads(result.stdout)["diagnoses"]
    (told,) = [each for each in found if each["subject"] not in NO_SERVICES]
    assert told["severity"] == "unknown"
    assert told["subject"] == "cluster"
    assert told["todo"]
    return dict(told)


def test_cluster_that_refuses_the_connection_is_one_finding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    kubeconfig = write_kubeconfig(tmp_path, port, trustme.CA().cert_pem.bytes())

    told = one_line(Cluster(KubernetesApi([]), kubeconfig).doctor("--json"))

    assert "does not answer" in told["message"]
    # Nor does the client talk of its own tries.
    assert caplog.text == ""


def test_cluster_with_another_certificate_is_one_finding(
    cluster: Cluster, tmp_path: Path
) -> None:
    port = int(cluster.kubeconfig.name.split("-")[1])
    wrong = write_kubeconfig(
        tmp_path, port, trustme.CA().cert_pem.bytes(), token="other"
    )

    told = one_line(Cluster(cluster.api, wrong).doctor("--json"))

    assert "SSL" in told["message"]
    assert cluster.api.asked == []


def test_expired_login_is_one_finding(cluster: Cluster) -> None:
    text = cluster.kubeconfig.read_text("utf-8").replace("sesame", "stale")
    cluster.kubeconfig.write_text(text, "utf-8")

    assert "does not know who we are" in one_line(cluster.doctor("--json"))["message"]


def test_missing_kubeconfig_is_one_finding(tmp_path: Path) -> None:
    nowhere = Cluster(KubernetesApi([]), tmp_path / "none")

    assert "no way to a cluster" in one_line(nowhere.doctor("--json"))["message"]


def test_context_that_is_not_there_is_one_finding(cluster: Cluster) -> None:
    result = cluster.doctor("--json", "--context", "elsewhere")

    assert "no way to a cluster" in one_line(result)["message"]


@pytest.mark.parametrize("package", ["kubernetes", "yaml"])
def test_missing_package_is_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the function's image, which has neither."""
    monkeypatch.setitem(sys.modules, package, None)
    where = ["--offline", str(HEALTHY)] if package == "yaml" else []

    result = CliRunner(env={"HOME": str(tmp_path)}).invoke(main, ["doctor", *where])

    assert result.exit_code == 2
    assert "'.[cluster]'" in result.stderr
    assert result.stderr.count("\n") == 1


# -- The command --------------------------------------------------------------------


def test_another_namespace_has_nothing(cluster: Cluster) -> None:
    found = cluster.found("--namespace", "elsewhere")

    assert "in namespace elsewhere" in bad(found)[0]["message"]


def test_partitions_may_be_said(cluster: Cluster) -> None:
    cluster.remove(TOPIC)

    found = cluster.found("--partitions", "11")

    (told,) = [each for each in found if "11 partitions" in each["message"]]
    assert (told["severity"], told["subject"]) == ("error", SCALED)


def test_source_of_another_name_is_found_when_it_is_alone(cluster: Cluster) -> None:
    cluster.object(SOURCE)["metadata"]["name"] = "orders"
    cluster.object(SCALED)["spec"]["scaleTargetRef"]["name"] = "orders"

    assert bad(cluster.found()) == []


def test_report_is_one_line_a_finding_the_worst_first(cluster: Cluster) -> None:
    put(SOURCE, "spec.ordering", "unordered")(cluster)
    put(SOURCE, "status.conditions", [{**NOT_READY[0], "message": "a\nb\x1b[2J"}])(
        cluster
    )

    result = cluster.doctor()

    *lines, counts = result.stdout.splitlines()
    severities = [line.split()[0] for line in lines]
    assert severities == sorted(severities, key=[each.value for each in Severity].index)
    assert severities[:2] == ["error", "error"]
    assert " -> set ordering: ordered" in result.stdout
    assert "\x1b" not in result.stdout
    assert counts.startswith("2 error, 2 unknown, ")


def test_deployment_overlay_is_healthy_too(cluster: Cluster) -> None:
    """No Serving: KEDA scales the Deployment behind the sink's Service."""
    as_deployment(cluster.api.documents)
    del cluster.api.served["serving.knative.dev/v1"]

    assert bad(cluster.found()) == []


def as_deployment(documents: list[Document]) -> None:
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    function = by_name["Service", "topup-function"]
    pod = function["spec"]["template"]["spec"]
    del pod["timeoutSeconds"], pod["containerConcurrency"]
    pod["terminationGracePeriodSeconds"] = 60
    labels = {"app": "topup-function"}
    function |= {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "spec": {"template": {"metadata": {"labels": labels}, "spec": pod}},
        "status": {"availableReplicas": 2},
    }
    documents.append(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "topup-door", "namespace": "topup"},
            "spec": {"selector": labels},
        }
    )
    by_name["KafkaSource", "topup-source"]["spec"]["sink"]["ref"] = {
        "apiVersion": "v1",
        "kind": "Service",
        "name": "topup-door",
    }
    by_name["ScaledObject", "topup-source"]["spec"] |= {
        "scaleTargetRef": {"name": "topup-function"},
        "maxReplicaCount": 3,
    }


@pytest.mark.parametrize(
    ("grace_s", "message"),
    [
        (40, "SERVER_GRACEFUL_TIMEOUT_S (50 s) must be less than terminationGraceP"),
        (55, "SERVER_TERMINATION_GRACE_S says 60, but the object says 55"),
    ],
)
def test_deployment_must_have_time_to_drain(
    cluster: Cluster, grace_s: int, message: str
) -> None:
    as_deployment(cluster.api.documents)
    pod = cluster.object("Deployment/topup-function")["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = grace_s

    assert [each for each in bad(cluster.found()) if message in each["message"]]


def test_client_certificate_must_be_in_pkcs8(cluster: Cluster) -> None:
    source = cluster.object(SOURCE)["spec"]["net"]
    del source["sasl"]
    secret = cluster.object("Secret/topup-source-kafka")["stringData"]
    for name in ("cert", "key"):
        reference = {"name": "topup-source-kafka", "key": f"user.{name}"}
        source["tls"][name] = {"secretKeyRef": reference}
        secret[f"user.{name}"] = f"-----BEGIN {'RSA PRIVATE'} KEY-----\nhunter2"

    (told,) = bad(cluster.found())
    assert "not in PKCS#8" in told["message"]

    secret["user.key"] = f"-----BEGIN {'PRIVATE'} KEY-----\nhunter2"
    assert bad(cluster.found()) == []


def test_topics_that_strimzi_does_not_look_after_are_told(cluster: Cluster) -> None:
    del cluster.api.served["kafka.strimzi.io/v1"]

    found = cluster.found("--partitions", "12")

    (told,) = [each for each in found if each["subject"] == "kafka.strimzi.io/v1"]
    assert told["severity"] == "skipped"
    (told,) = bad(found)
    assert "no KafkaTopic declares it" in told["message"]


def test_older_api_is_named(cluster: Cluster) -> None:
    served = cluster.api.served
    served["sources.knative.dev/v1beta1"] = served.pop("sources.knative.dev/v1")
    cluster.remove(SOURCE)

    told = cluster.found()[0]

    assert told["subject"] == "sources.knative.dev/v1"
    assert "but there is sources.knative.dev/v1beta1" in told["message"]


def test_authentication_of_another_namespace_is_told(cluster: Cluster) -> None:
    (trigger,) = cluster.object(SCALED)["spec"]["triggers"]
    trigger["authenticationRef"]["kind"] = "ClusterTriggerAuthentication"

    (told,) = [each for each in cluster.found() if each["severity"] == "skipped"]

    assert "ClusterTriggerAuthentication/topup-keda is not looked at" in told["message"]


# -- Offline ------------------------------------------------------------------------


def offline(path: Path | str, *words: str, given: str | None = None) -> Result:
    command = ["doctor", "--offline", str(path), *words]
    return CliRunner().invoke(main, command, input=given)


def manifests() -> list[Document]:
    """As they are in a repository: no status, and no number that somebody scales."""
    documents = healthy()
    for each in documents:
        each.pop("status", None)
    del documents[0]["spec"]["consumers"]
    return documents


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    folder = tmp_path / "rendered"
    folder.mkdir()
    for number, each in enumerate(manifests()):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(each), "utf-8")
    return folder


def test_rendered_manifests_are_fine_and_what_needs_a_cluster_is_named(
    rendered: Path,
) -> None:
    result = offline(rendered, "--json")

    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert bad(report["diagnoses"]) == []
    skipped = [e["subject"] for e in report["diagnoses"] if e["severity"] == "skipped"]
    assert {"APIs", SOURCE, FUNCTION, SCALED, "ledger", "recharge API"} <= set(skipped)
    assert offline(rendered, "--strict").exit_code == 0


def test_rendered_manifests_can_come_from_kustomize(rendered: Path) -> None:
    text = yaml.safe_dump_all(manifests())
    file = rendered.parent / "all.yaml"
    file.write_text(text, "utf-8")
    listed = yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": manifests()})

    said = offline(rendered).stdout.splitlines()
    assert sorted(offline("-", given=text).stdout.splitlines()) == sorted(said)
    assert sorted(offline(file).stdout.splitlines()) == sorted(said)
    assert sorted(offline("-", given=listed).stdout.splitlines()) == sorted(said)


def test_rendered_namespace_is_that_of_the_source(rendered: Path) -> None:
    """An overlay may name another."""
    moved = yaml.safe_dump_all(manifests()).replace(
        "namespace: topup", "namespace: pay"
    )
    said = offline(rendered).stdout

    assert offline("-", given=moved).stdout == said
    assert offline("-", "--namespace", "pay", given=moved).stdout == said
    assert offline("-", "--namespace", "topup", given=moved).stdout != said


def test_rendered_example_secrets_may_be_empty_but_not_lack_a_key(
    rendered: Path,
) -> None:
    documents = manifests()
    for each in documents:
        if each["kind"] == "Secret":
            each["stringData"] = dict.fromkeys(each["stringData"], "")
    assert offline("-", given=yaml.safe_dump_all(documents)).exit_code == 0

    (secret,) = [e for e in documents if e["metadata"]["name"] == "topup-keda-kafka"]
    del secret["stringData"]["user"]
    result = offline("-", given=yaml.safe_dump_all(documents))
    assert result.exit_code == 1
    assert "has no key user" in result.stdout
    assert rendered.exists()


@pytest.mark.parametrize(
    ("kept", "skipped"),
    [
        (
            {"KafkaSource"},
            {
                "topup-function",
                "topup-resolver",
                "KafkaSink/topup-dead-letters",
                "Secret/topup-source-kafka",
                "ScaledObject",
                "topic topup-requests",
            },
        ),
        ({"KafkaSource", "ScaledObject"}, {"TriggerAuthentication/topup-keda"}),
    ],
)
def test_what_is_not_rendered_is_named_and_no_error(
    kept: set[str], skipped: set[str]
) -> None:
    documents = [each for each in manifests() if each["kind"] in kept]
    documents[0]["spec"]["sink"]["audience"] = "topup"

    text = yaml.safe_dump_all(documents)
    result = offline("-", "--json", "--partitions", "12", given=text)

    found = json.loads(result.stdout)["diagnoses"]
    assert bad(found) == []
    assert skipped <= {e["subject"] for e in found if e["severity"] == "skipped"}
    assert [each for each in found if "authentication-oidc" in each["message"]]


def test_rendered_fault_is_found_without_a_cluster(rendered: Path) -> None:
    documents = manifests()
    documents[0]["spec"]["ordering"] = "unordered"

    result = offline("-", given=yaml.safe_dump_all(documents))

    assert result.exit_code == 1
    assert "overtake" in result.stdout
    assert rendered.exists()


def test_warning_is_an_error_only_when_strict(rendered: Path) -> None:
    documents = manifests()
    del documents[0]["spec"]["ceOverrides"]
    text = yaml.safe_dump_all(documents)

    assert offline("-", given=text).exit_code == 0
    assert offline("-", "--strict", given=text).exit_code == 1
    assert rendered.exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("kustomization.yaml", "resources: []", "kubectl kustomize"),
        ("a.yaml", "a: [", "is no YAML, line 1"),
        ("a.yaml", "kind: ", "has no Kubernetes object"),
        ("a.yaml", "\udcff", "is no text"),
    ],
)
def test_folder_that_is_none_is_one_line(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))

    result = offline(tmp_path)

    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_offline_looks_at_no_cluster(tmp_path: Path) -> None:
    assert offline(tmp_path / "none").exit_code == 2
    assert offline(HEALTHY, "--context", "test").exit_code == 2


# -- Words of others ----------------------------------------------------------------

SCHEMA: Final = (
    Path(os.environ.get("CRD_SCHEMAS", Path(__file__).parents[3] / "shared" / "crds"))
    / "keda-scaler-schema-kafka.json"
)


def test_words_of_a_trigger_are_those_of_keda() -> None:
    """Its schema is compared where it is at hand; a credential is never a word."""
    plain = {each for each in TRIGGER_WORDS if not each.endswith("FromEnv")}
    (scaled,) = [each for each in healthy() if each["kind"] == "ScaledObject"]

    assert set(scaled["spec"]["triggers"][0]["metadata"]) <= plain
    assert plain.isdisjoint({"username", "password", "ca", "cert", "key"})
    if SCHEMA.exists():
        scalers = json.loads(SCHEMA.read_text("utf-8"))["scalers"]
        (kafka,) = [each for each in scalers if each["type"] == "kafka"]
        assert plain == {
            each["name"]
            for each in kafka["parameters"]
            if each.get("metadataVariableReadable")
        }


# -- Whatever is written there ------------------------------------------------------

_ODD: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def _paths(value: object, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for name, child in children:
        yield from _paths(child, (*way, name))


PATHS: Final = [
    path
    for path in _paths(healthy())
    if path[1:] not in {("kind",), ("apiVersion",)} and len(path) > 1
]


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(path=st.sampled_from(PATHS), odd=_ODD, is_live=st.booleans())
def test_nothing_that_stands_in_a_document_ends_in_a_traceback(
    path: tuple[Any, ...], odd: object, *, is_live: bool
) -> None:
    objects: Any = healthy()
    holder = objects
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = odd

    found = examine(
        parts_of(Documents(namespace="topup", objects=objects, is_live=is_live))
    )

    assert found


def test_reading_hides_what_a_secret_holds() -> None:
    documents = read_offline(str(HEALTHY))

    held = [each for each in documents.objects if each["kind"] == "Secret"]
    assert {value for each in held for value in each["data"].values()} == {
        "(hidden)",
        "SCRAM-SHA-512",
    }
