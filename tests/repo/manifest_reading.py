"""How the checks of the manifests read them: pods, references, settings, durations.

Owns what a workload, a reference and a setting look like in YAML; must never decide
what is right.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from function.config import settings_table
from tests.repo.rendered import Document, address, field, find, of_kind

NAMESPACE: Final = "topup"
SOURCE: Final = "KafkaSource/topup-source"
SINK: Final = "KafkaSink/topup-dead-letters"
SETTINGS: Final = "ConfigMap/topup-settings"
#: queue-proxy waits so long for the endpoints to forget the pod before it stops, and
#: our process hears of SIGTERM only then (knative/serving, drainSleepDuration).
QUEUE_PROXY_QUIET_S: Final = 30
#: Objects that something else makes: Kubernetes itself, or a command of the README.
MADE_ELSEWHERE: Final = {
    "ConfigMap/kube-root-ca.crt": {"ca.crt"},
    "ConfigMap/topup-sandbox": {"recharge_api.py"},
}
#: What is in no namespace.
CLUSTER_WIDE: Final = {
    "Namespace",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
_OURS: Final = re.compile(r"(^|/)topup-function[:@]")
_DURATION: Final = re.compile(r"PT([0-9.]+)S")


def workloads(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(address, pod template) of whatever makes pods."""
    for document in documents:
        for path in ("spec.template", "spec.jobTemplate.spec.template"):
            template = field(document, path)
            if field(template, "spec.containers"):
                yield address(document), template


def containers(template: Document) -> list[Document]:
    """All containers of a pod, those that run first included."""
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def ours(documents: list[Document]) -> Iterator[tuple[str, Document, Document]]:
    """(address, pod template, container) of what runs this project's `topup`."""
    for name, template in workloads(documents):
        for container in containers(template):
            if _OURS.search(container["image"]) and name != "Deployment/topup-sandbox":
                yield name, template, container


def data_of(document: Document | None) -> dict[str, str]:
    """The keys and values of a ConfigMap or Secret."""
    document = document or {}
    return {**document.get("data", {}), **document.get("stringData", {})}


def settings_of(documents: list[Document]) -> dict[str, str]:
    """The shared settings, the code's defaults where the ConfigMap is silent."""
    defaults = {name: default for name, default, _ in settings_table()}
    return {**defaults, **data_of(find(documents, SETTINGS))}


def seconds(duration: str) -> float:
    """`PT0.5S` in seconds; NaN, which is in no order, for any other form."""
    match = _DURATION.fullmatch(duration)
    return float(match[1]) if match else float("nan")


def keys_there(documents: list[Document]) -> dict[str, set[str]]:
    """`Secret/name` or `ConfigMap/name` -> its keys, whoever makes it."""
    found = {name: set(keys) for name, keys in MADE_ELSEWHERE.items()}
    for each in of_kind(documents, "Secret", "ConfigMap"):
        found[address(each)] = set(data_of(each))
    for each in of_kind(documents, "KafkaUser"):
        is_tls = field(each, "spec.authentication.type") == "tls"
        found[f"Secret/{each['metadata']['name']}"] = (
            {"ca.crt", "user.crt", "user.key", "user.p12", "user.password"}
            if is_tls
            else {"password", "sasl.jaas.config"}
        )
    for each in of_kind(documents, "Kafka"):
        name = f"Secret/{each['metadata']['name']}-cluster-ca-cert"
        found[name] = {"ca.crt", "ca.p12", "ca.password"}
    for each in of_kind(documents, "Certificate"):
        found[f"Secret/{each['spec']['secretName']}"] = {"tls.crt", "tls.key", "ca.crt"}
    return found


def _named(word: str, to: Any) -> list[tuple[str, str]]:
    """What one field refers to; nothing if it is no reference."""
    kind = "Secret" if word.startswith("secret") else "ConfigMap"
    match word:
        case "secretKeyRef" | "configMapKeyRef":
            return [(f"{kind}/{to['name']}", to["key"])]
        case "secretTargetRef" | "configMapTargetRef":
            return [(f"{kind}/{each['name']}", each["key"]) for each in to]
        case "configMapRef":
            return [(f"{kind}/{to['name']}", "")]
        case "secret" | "configMap":
            # A volume's, a projected volume's, or a KafkaSink's.
            name = to.get("secretName") or to.get("name") or field(to, "ref.name")
            keys = [each["key"] for each in to.get("items", [])] or [""]
            return [(f"{kind}/{name}", key) for key in keys]
    return []


def references(value: Any) -> Iterator[tuple[str, str]]:
    """(`Secret/name`, key) of each reference, however deep; an empty key is any."""
    if isinstance(value, list):
        for each in value:
            yield from references(each)
    if isinstance(value, dict):
        for word, to in value.items():
            yield from _named(word, to) or references(to)
