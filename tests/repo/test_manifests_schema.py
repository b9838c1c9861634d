"""Every manifest is what its kind's schema allows, and no field is left unknown.

An API server drops what it doesn't know, or refuses it when it is too late: a mistyped
`deadLetterSink` would lose records in silence. The schemas of Knative, KEDA, Strimzi
and cert-manager are upstream's, and looked for beside the project.
"""

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from tests.repo.rendered import FOLDERS, ROOT, Document, address, of_kind, put, render

#: Upstream's own files; another place is named by the variable.
SCHEMAS: Final = Path(
    os.environ.get("CRD_SCHEMAS", ROOT.parent / "shared" / "crds")
).resolve()
#: Kinds that are no part of Kubernetes, in the versions that we write.
CUSTOM: Final = {
    "serving.knative.dev/v1": {"Service"},
    "sources.knative.dev/v1": {"KafkaSource"},
    "eventing.knative.dev/v1alpha1": {"KafkaSink", "EventPolicy"},
    "kafka.strimzi.io/v1": {"Kafka", "KafkaNodePool", "KafkaTopic", "KafkaUser"},
    "keda.sh/v1alpha1": {"ScaledObject", "TriggerAuthentication"},
    "cert-manager.io/v1": {"Issuer", "Certificate"},
}
#: What people write into the metadata; the rest is the API server's.
METADATA: Final = ("annotations", "labels", "name", "namespace")

needs_upstream_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(),
    reason="custom kinds are NOT checked: the upstream schemas are no part of the "
    "project; put them into ../shared/crds or name their folder in CRD_SCHEMAS",
)


def is_custom(document: Document) -> bool:
    return document["kind"] in CUSTOM.get(document["apiVersion"], ())


def strict(schema: Any) -> Any:
    """A structural schema as JSON Schema that refuses what isn't named in it."""
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for word, value in schema.items():
        if word == "properties":
            made[word] = {name: strict(each) for name, each in value.items()}
        elif word in {"items", "additionalProperties", "not"}:
            made[word] = strict(value)
        elif word in {"anyOf", "oneOf", "allOf"}:
            # They only add conditions: what is named is named beside them.
            made[word] = value
        elif not word.startswith("x-kubernetes-") and word != "nullable":
            made[word] = value
    is_free = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif schema.get("type") == "object" and not is_free:
        made.setdefault("additionalProperties", False)
    if schema.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    return made


@functools.cache
def custom_schemas() -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) -> schema, of all that upstream serves."""
    found: dict[tuple[str, str], Any] = {}
    for path in sorted(SCHEMAS.glob("*.yaml")):
        for document in yaml.load_all(path.read_text("utf-8"), yaml.CSafeLoader):
            if not document or document["kind"] != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                if version["served"]:
                    key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                    found[key] = strict(version["schema"]["openAPIV3Schema"])
                    found[key].setdefault("properties", {}).update(
                        apiVersion={"type": "string"},
                        kind={"type": "string"},
                        metadata={
                            "type": "object",
                            "properties": {name: {} for name in METADATA},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    )
    return found


def custom_problems(documents: list[Document]) -> list[str]:
    schemas = custom_schemas()
    problems = []
    for document in filter(is_custom, documents):
        schema = schemas.get((document["apiVersion"], document["kind"]))
        if schema is None:
            problems.append(f"{address(document)}: upstream serves no such version")
            continue
        # Draft 4: `exclusiveMinimum` is a boolean there, as in OpenAPI 3.0.
        problems += [
            f"{address(document)}: {error.instance_path}: {error.message}"
            for error in jsonschema_rs.Draft4Validator(schema).iter_errors(document)
        ]
    return problems


def built_in_problems(documents: list[Document]) -> list[str]:
    version = kubernetes_validate.latest_version()
    problems = []
    for document in documents:
        if is_custom(document):
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            problems.append(f"{address(document)}: Kubernetes has no such kind")
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{address(document)}: {error}")
    return problems


def keda_kafka_parameters() -> dict[str, dict[str, Any]]:
    scalers = json.loads((SCHEMAS / "keda-scaler-schema-kafka.json").read_text("utf-8"))
    kafka = next(each for each in scalers["scalers"] if each["type"] == "kafka")
    return {each["name"]: each for each in kafka["parameters"]}


def trigger_problems(documents: list[Document]) -> list[str]:
    """KEDA's own CRD leaves triggers free-form; its scaler's schema does not."""
    known = keda_kafka_parameters()
    problems = []
    for scaled in of_kind(documents, "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            metadata = trigger["metadata"]
            for name, value in metadata.items():
                parameter = known.get(name, {})
                if not parameter.get("metadataVariableReadable"):
                    problems.append(f"{name}: no metadata of a kafka trigger")
                elif not isinstance(value, str):
                    problems.append(f"{name}: {value!r} is no string")
                elif value not in parameter.get("allowedValue", [value]):
                    problems.append(f"{name}: {value} is not allowed")
            problems += [
                f"{name}: is missing"
                for name, parameter in known.items()
                if not parameter.get("optional")
                and "default" not in parameter
                and name not in metadata
            ]
    problems += [
        f"{target['parameter']}: no parameter of an authentication"
        for authentication in of_kind(documents, "TriggerAuthentication")
        for targets in authentication["spec"].values()
        for target in targets
        if not known.get(target["parameter"], {}).get(
            "triggerAuthenticationVariableReadable"
        )
    ]
    return problems


def documents_of(folder: str, wanted: str) -> list[Document]:
    return [copy.deepcopy(each) for each in render(folder) if address(each) == wanted]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_renders_and_every_kind_is_one_that_is_meant(folder: str) -> None:
    unknown = [
        address(each)
        for each in render(folder)
        if "." in each["apiVersion"].partition("/")[0]
        and not each["apiVersion"].partition("/")[0].endswith(".k8s.io")
        and not is_custom(each)
    ]

    assert unknown == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_built_in_kinds_are_strictly_what_kubernetes_knows(folder: str) -> None:
    assert built_in_problems(render(folder)) == []


@needs_upstream_schemas
@pytest.mark.parametrize("folder", FOLDERS)
def test_custom_kinds_are_strictly_what_upstream_knows(folder: str) -> None:
    assert custom_problems(render(folder)) == []


@needs_upstream_schemas
@pytest.mark.parametrize("folder", [name for name in FOLDERS if "keda" in name])
def test_triggers_are_strictly_what_the_kafka_scaler_knows(folder: str) -> None:
    assert trigger_problems(render(folder)) == []


BASE: Final = "manifests/base"


@pytest.mark.parametrize(
    ("wanted", "path", "value"),
    [
        ("Deployment/topup-resolver", "spec.replica", 2),
        ("Deployment/topup-resolver", "spec.template.spec.containers.0.comand", []),
        ("Deployment/topup-resolver", "spec.replicas", "two"),
        ("NetworkPolicy/topup-dns", "spec.egress.0.port", []),
        ("Job/topup-migrate", "spec.backoffLimits", 1),
        ("CronJob/topup-purge", "spec.timezone", "Etc/UTC"),
        ("Deployment/topup-resolver", "kind", "Deploiment"),
    ],
)
def test_broken_built_in_kind_is_refused(wanted: str, path: str, value: Any) -> None:
    documents = documents_of(BASE, wanted)
    put(documents[0], path, value)

    assert built_in_problems(documents) != []


@needs_upstream_schemas
@pytest.mark.parametrize(
    ("folder", "wanted", "path", "value"),
    [
        (BASE, "KafkaSource/topup-source", "spec.delivery.retries", 3),
        (BASE, "KafkaSource/topup-source", "spec.deadLetterSink", {}),
        (BASE, "KafkaSource/topup-source", "spec.delivery.retry", "1600"),
        (BASE, "KafkaSource/topup-source", "spec.consumerGroupID", "a"),
        (BASE, "KafkaSource/topup-source", "metadata.anotations", {}),
        (BASE, "KafkaSink/topup-dead-letters", "spec.topics", ["a"]),
        (BASE, "KafkaSink/topup-dead-letters", "spec.topic", None),
        (BASE, "KafkaSink/topup-dead-letters", "spec.contentMode", "raw"),
        (
            BASE,
            "KnativeService/topup-function",
            "spec.template.spec.terminationGracePeriodSeconds",
            60,
        ),
        (
            BASE,
            "KnativeService/topup-function",
            "spec.template.spec.containers.0.lifecycle",
            {},
        ),
        ("manifests/kafka", "KafkaUser/topup-keda", "spec.authorization.acl", []),
        (
            "manifests/kafka",
            "KafkaUser/topup-keda",
            "spec.authorization.acls.0.operation",
            "Describe",
        ),
        ("manifests/kafka", "Kafka/topup-kafka", "spec.kafka.replicas", 3),
        ("manifests/kafka", "Kafka/topup-kafka", "spec.zookeeper", {}),
        (
            "manifests/kafka",
            "Kafka/topup-kafka",
            "spec.kafka.listeners.0.typ",
            "internal",
        ),
        ("keda", "ScaledObject/topup-source", "spec.maxReplicas", 12),
        ("certs", "Certificate/topup-database", "spec.privateKey.encoding", "PKCS7"),
    ],
)
def test_broken_custom_kind_is_refused(
    folder: str, wanted: str, path: str, value: Any
) -> None:
    documents = documents_of(folder, wanted)
    put(documents[0], path, value)

    assert custom_problems(documents) != []


@needs_upstream_schemas
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.triggers.0.metadata.lagTreshold", "10"),
        ("spec.triggers.0.metadata.password", "x"),
        ("spec.triggers.0.metadata.sasl", "SCRAM-SHA-512"),
        ("spec.triggers.0.metadata.lagThreshold", 100),
        ("spec.triggers.0.metadata.consumerGroup", None),
        ("spec.triggers.0.metadata.offsetResetPolicy", "newest"),
    ],
)
def test_broken_trigger_is_refused(path: str, value: Any) -> None:
    documents = documents_of("keda", "ScaledObject/topup-source")
    put(documents[0], path, value)

    assert trigger_problems(documents) != []


@needs_upstream_schemas
def test_broken_authentication_is_refused() -> None:
    documents = documents_of("keda", "TriggerAuthentication/topup-keda-scram")
    put(documents[0], "spec.secretTargetRef.0.parameter", "pasword")

    assert trigger_problems(documents) == ["pasword: no parameter of an authentication"]
