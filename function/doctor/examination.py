"""`topup doctor`: every check, in one order, over a cluster or rendered manifests.

Owns which checks are made and where their settings come from; must never change
anything, and never let one check's failure hide another's finding.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from function.api_profile import load_profile
from function.config import Settings
from function.database import make_engine
from function.doctor import documents as kinds
from function.doctor.api import check_api
from function.doctor.diagnosis import RANK, Diagnosis, error, ok, skipped, unknown
from function.doctor.documents import Documents, Parts, at, kind_of
from function.doctor.ledger import check_ledger, check_other_apis
from function.doctor.pods import check_pods, scale_max, settings_of_pod
from function.doctor.scaling import check_scaling
from function.doctor.source import check_source
from function.doctor.topics import check_topics, retention_s
from function.errors import SettingsError

#: API, resources that we need of it, what it is for.
_SOURCES: Final = (
    "sources.knative.dev/v1",
    ("kafkasources", "kafkasources/scale"),
    "Knative's Kafka source",
)
_SERVING: Final = ("serving.knative.dev/v1", ("services",), "Knative Serving")
_SINKS: Final = ("eventing.knative.dev/v1alpha1", ("kafkasinks",), "the KafkaSink")
_KEDA: Final = (
    "keda.sh/v1alpha1",
    ("scaledobjects", "triggerauthentications"),
    "KEDA",
)
_STRIMZI: Final = "kafka.strimzi.io/v1"
#: Where nothing says how long the topic keeps a record.
_TOPIC_RETENTION_S: Final = 604_800.0


def examine(parts: Parts) -> list[Diagnosis]:
    """Judge the documents; the worst first."""
    settings = _settings(parts)
    told_s = settings.topic_retention_s if settings else _TOPIC_RETENTION_S
    topic_s = retention_s(parts.topic)
    found = [
        *_apis(parts),
        *check_source(parts, told_s if topic_s is None else topic_s),
        *check_pods(parts),
        *check_scaling(parts),
        *check_topics(parts, settings),
    ]
    return in_order(found)


def in_order(diagnoses: Iterable[Diagnosis]) -> list[Diagnosis]:
    """The worst first, else as they were found; each once."""
    return sorted(dict.fromkeys(diagnoses), key=lambda each: RANK[each.severity])


def examine_services(
    env: Mapping[str, str], parts: Parts | None, *, is_live: bool
) -> list[Diagnosis]:
    """Ask the database and the recharge API, where `env` says how to reach them.

    Args:
        env: the variables of the function, as in its pod.
        parts: what was read of the cluster, if anything was; tells how many connections
            there may be.
        is_live: whether an unset address is a gap, or as expected.

    """
    return in_order(
        [*_ledger(env, parts, is_live=is_live), *_api(env, is_live=is_live)]
    )


def _ledger(
    env: Mapping[str, str], parts: Parts | None, *, is_live: bool
) -> Iterator[Diagnosis]:
    if not env.get("LEDGER_DATABASE_URL"):
        yield _not_set("ledger", "LEDGER_DATABASE_URL", is_live=is_live)
        return
    try:
        settings = Settings.ledger_only(env)
        engine = make_engine(settings)
        identity = load_profile(settings).identity
    except SettingsError as problem:
        yield error("ledger", str(problem), "correct the variables of this command")
        return
    try:
        yield from check_ledger(engine, None if parts is None else _connections(parts))
        if settings.recharge_api_url:
            yield from check_other_apis(engine, identity)
    finally:
        engine.dispose()


def _api(env: Mapping[str, str], *, is_live: bool) -> Iterator[Diagnosis]:
    if not env.get("RECHARGE_API_URL"):
        yield _not_set("recharge API", "RECHARGE_API_URL", is_live=is_live)
        return
    try:
        # The ledger's address is another check's.
        settings = Settings.from_env({"LEDGER_DATABASE_URL": "sqlite:///-", **env})
    except SettingsError as problem:
        yield error("recharge API", str(problem), "correct the variables")
        return
    yield from check_api(settings)


def _not_set(subject: str, name: str, *, is_live: bool) -> Diagnosis:
    message = f"was not asked: {name} is not set here"
    todo = "run this with the function's settings, such as in a pod beside it"
    return (unknown if is_live else skipped)(subject, message, todo)


def _connections(parts: Parts) -> int | None:
    """What all pods may open at once, while a new revision replaces an old one."""
    settings = _settings(parts)
    pods = scale_max(parts)
    return None if settings is None or not pods else 2 * pods * settings.server_threads


def _settings(parts: Parts) -> Settings | None:
    """The function's settings; None when there are none that can be read."""
    if parts.function is None:
        return None
    try:
        return settings_of_pod(parts, parts.function)
    except SettingsError:
        return None


# -- What the cluster serves --------------------------------------------------------


def _apis(parts: Parts) -> Iterator[Diagnosis]:
    """Whether the CRDs are there, in the versions that our manifests use."""
    documents = parts.documents
    if not documents.is_live:
        yield skipped("APIs", "which versions are served, only a cluster can tell")
        return
    for api, resources, what in _needed(parts):
        if _is_unread(documents, api):
            continue
        served = documents.served.get(api, frozenset())
        lacking = [each for each in resources if each not in served]
        if lacking:
            yield error(
                api,
                f"does not serve {', '.join(lacking)}{_instead(documents, api)}",
                f"install {what} in a version that does",
            )
        else:
            yield ok(api, f"serves {', '.join(resources)}")
    if not (documents.served.get(_STRIMZI) or _is_unread(documents, _STRIMZI)):
        yield skipped(_STRIMZI, "is not served: topics are looked after elsewhere")


def _needed(parts: Parts) -> Iterator[tuple[str, tuple[str, ...], str]]:
    yield _SOURCES
    yield _KEDA
    function = parts.function
    if function is None or kind_of(function) == kinds.KNATIVE_SERVICE:
        yield _SERVING
    sink = at(parts.source, "spec", "delivery", "deadLetterSink", "ref")
    if at(sink, "kind") == "KafkaSink":
        yield _SINKS


def _is_unread(documents: Documents, api: str) -> bool:
    group = api.partition("/")[0]
    return api not in documents.served and any(
        kind.endswith(f".{group}") for kind in documents.unread
    )


def _instead(documents: Documents, api: str) -> str:
    group = api.partition("/")[0]
    others = sorted(
        each
        for each in documents.served
        if each.startswith(f"{group}/") and each != api
    )
    return f" (but there is {', '.join(others)})" if others else ""
