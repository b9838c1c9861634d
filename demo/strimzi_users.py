"""The Kafka users of manifests/kafka, for a broker that has no Strimzi.

Owns the reading of KafkaUser objects into ACLs: what the story runs with and the tests
prove is what a cluster is given. Must never add a right, or pass over one that it does
not understand.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml
from confluent_kafka.admin import (  # type: ignore[attr-defined] # not in __all__
    AclOperation,
    ResourceType,
)

from demo.kafka_broker import Acl
from demo.server_process import PROJECT

FOLDER: Final = PROJECT / "manifests" / "kafka"
PRODUCER: Final = "topup-producer"
SOURCE: Final = "topup-source"
KEDA: Final = "topup-keda"
DEAD_LETTER_WRITER: Final = "topup-dead-letter-writer"

_RESOURCES: Final = {"topic": ResourceType.TOPIC, "group": ResourceType.GROUP}
#: What the User Operator takes for granted, and the only thing that we understand.
_PLAIN: Final = {"type": "allow", "host": "*"}


def read_users(folder: Path = FOLDER) -> dict[str, tuple[Acl, ...]]:
    """Name -> rights of each KafkaUser in the YAML files of a folder.

    Raises:
        ValueError: a file has an ACL that is more than an operation allowed to
            everybody's host on a topic or group of exactly one name; says which file.

    """
    users = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            if document and document.get("kind") == "KafkaUser":
                try:
                    users[document["metadata"]["name"]] = _acls(document["spec"])
                except (KeyError, ValueError) as error:
                    raise ValueError(f"{path}: {error}") from error
    return users


def suffixed(acls: Iterable[Acl], suffix: str) -> tuple[Acl, ...]:
    """The same rights on topics of longer names; groups are named as ever."""
    return tuple(
        dataclasses.replace(acl, name=acl.name + suffix)
        if acl.resource is ResourceType.TOPIC
        else acl
        for acl in acls
    )


def _acls(spec: dict[str, Any]) -> tuple[Acl, ...]:
    authorization = spec["authorization"]
    if authorization["type"] != "simple":
        raise ValueError(f"authorization of type {authorization['type']}")
    return tuple(
        Acl(_RESOURCES[resource["type"]], resource["name"], _operation(operation))
        for rule, resource in map(_plain, authorization["acls"])
        for operation in rule["operations"]
    )


def _plain(rule: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rule and its resource, if that is all there is to it."""
    resource = rule["resource"]
    if resource.get("patternType", "literal") != "literal":
        raise ValueError(f"a pattern of type {resource['patternType']}")
    for name, value in _PLAIN.items():
        if rule.get(name, value) != value:
            raise ValueError(f"a rule of {name} {rule[name]}")
    return rule, resource


def _operation(name: str) -> AclOperation:
    """Strimzi's `DescribeConfigs` is Kafka's DESCRIBE_CONFIGS."""
    return AclOperation[re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()]
