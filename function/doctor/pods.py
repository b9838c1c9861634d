"""Whether function and resolver have the settings, secrets and time that they need.

Owns what is checked about pods and the order of deadlines across objects; must never
read anything itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, get_type_hints

from function.config import LEASE, Settings, settings_table
from function.doctor import documents as kinds
from function.doctor.diagnosis import Diagnosis, error, ok, skipped, warning
from function.doctor.documents import Document, Parts, Reference, at, number, subject_of
from function.doctor.source import Delivery, is_ready
from function.errors import SettingsError

_KNOWN: Final = frozenset(name for name, _, _ in settings_table())
_REQUIRED: Final = tuple(
    name for name, default, _ in settings_table() if default == "required"
)
#: Whatever else a variable of ours may begin with would be a typing error.
_OWNERS: Final = tuple(sorted({name.partition("_")[0] + "_" for name in _KNOWN}))
#: The resolver and the function take up each other's orders: they must agree on these.
_SHARED: Final = (
    "LEDGER_LEASE_MARGIN_S",
    "EVENT_REDELIVERY_MAX_S",
    *sorted(
        name
        for name in _KNOWN
        if name.startswith("RECHARGE_API_") and not name.endswith("_FILE")
    ),
)
#: Files that come with the image, such as the system's CA bundle.
_OF_THE_IMAGE: Final = ("/etc/ssl/", "/usr/", "/app/")
_VISIBILITY: Final = "networking.knative.dev/visibility"
_SCALE: Final = "autoscaling.knative.dev/"


def settings_of_pod(parts: Parts, pod: Document) -> Settings:
    """The settings that a pod would read, where files are taken to be there.

    Raises:
        SettingsError: what is missing or contradicts another, as at the pod's start.

    """
    env = kinds.environment(parts.documents, pod)
    hints = get_type_hints(Settings)
    readable = {}
    for name, value in env.items():
        hint = hints.get(name.lower())
        # Whether a file is mounted is another check's; here any file will do.
        is_file = hint in {Path, Path | None}
        readable[name] = __file__ if is_file and value else value
        if value == kinds.HIDDEN and hint is str:
            readable[name] = "https://hidden"
    return Settings.from_env(readable)


def check_pods(parts: Parts) -> Iterator[Diagnosis]:
    """Everything about the pods that run our image."""
    if parts.function is None:
        yield from _missing(
            parts, kinds.FUNCTION_NAME, kinds.KNATIVE_SERVICE, kinds.DEPLOYMENT
        )
    if parts.resolver is None:
        yield from _missing(parts, kinds.RESOLVER_NAME, kinds.DEPLOYMENT)
    for pod in parts.pods:
        yield from _settings(parts, pod)
        yield from _not_mounted(parts, pod)
    if parts.function is not None:
        yield from _function(parts, parts.function)
    if parts.resolver is not None:
        yield from _resolver(parts, parts.resolver)
    yield from _secrets(parts)


def _missing(parts: Parts, name: str, *of: str) -> Iterator[Diagnosis]:
    if not parts.documents.is_live:
        yield skipped(name, "is not among the documents")
    elif all(parts.documents.is_readable(kind) for kind in of):
        yield error(
            name,
            f"does not exist in namespace {parts.documents.namespace}",
            "apply the manifests, or say --namespace",
        )


def _settings(parts: Parts, pod: Document) -> Iterator[Diagnosis]:
    subject = subject_of(pod)
    env = kinds.environment(parts.documents, pod)
    strange = [name for name in env if name.startswith(_OWNERS) and name not in _KNOWN]
    for name in sorted(strange):
        yield warning(
            subject,
            f"{name} is no setting, and does nothing",
            "correct its name; README lists them all",
        )
    lost = _unresolved(parts, pod)
    if lost:
        # What the ConfigMap would say is not known; its absence is told elsewhere.
        return
    try:
        settings_of_pod(parts, pod)
    except SettingsError as problem:
        yield error(subject, str(problem), "correct the settings; it can't start")
    else:
        yield ok(subject, "its settings are complete, its deadlines in their order")


def _unresolved(parts: Parts, pod: Document) -> list[Reference]:
    """The ConfigMaps that the pod's variables come from and that we don't have."""
    return [
        each
        for each in kinds.references_of_environment(pod)
        if each.kind == kinds.CONFIG_MAP
        and parts.documents.find(each.kind, each.name) is None
    ]


def _files(env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Setting and path of each file that a pod is told of."""
    for name, hint in get_type_hints(Settings).items():
        path = env.get(name.upper(), "")
        if hint == Path | None and path.startswith("/"):
            yield name.upper(), path


def _not_mounted(parts: Parts, pod: Document) -> Iterator[Diagnosis]:
    """Every setting that names a file names one that is mounted, or the image's own."""
    for name, path in _files(kinds.environment(parts.documents, pod)):
        is_there = kinds.mounted(pod, path) or kinds.is_own_token(pod, path)
        if not is_there and not path.startswith(_OF_THE_IMAGE):
            yield error(
                subject_of(pod),
                f"{name} is {path}, where nothing is mounted",
                "mount the Secret there, or correct the path",
            )


def _references(parts: Parts) -> Iterator[Reference]:
    yield from kinds.references(parts)
    for pod in parts.pods:
        for _, path in _files(kinds.environment(parts.documents, pod)):
            reference = kinds.mounted(pod, path)
            if reference is not None:
                yield reference


def _secrets(parts: Parts) -> Iterator[Diagnosis]:
    """Every reference leads to an object that has the key, with something in it."""
    needed: dict[tuple[str, str], list[Reference]] = {}
    for each in _references(parts):
        needed.setdefault((each.kind, each.name), []).append(each)
    problems: list[Diagnosis] = []
    for (kind, name), references in needed.items():
        found = parts.documents.find(kind, name)
        if found is None:
            problems += _absent(parts, references)
        else:
            problems += _keys(parts, found, references)
    yield from problems
    if needed and not problems:
        yield ok(
            "Secrets and ConfigMaps",
            f"all {len(needed)} that are referred to are there",
        )


def _absent(parts: Parts, references: Sequence[Reference]) -> Iterator[Diagnosis]:
    first = references[0]
    subject = f"{first.kind}/{first.name}"
    keys = sorted({each.key for each in references if each.key is not None})
    needs = f"{first.needed_by} needs {', '.join(keys) or 'it'}"
    if not parts.documents.is_live:
        yield skipped(subject, f"is not among the documents; {needs}")
    elif parts.documents.is_readable(first.kind, first.name):
        yield error(
            subject,
            f"does not exist; {needs}",
            "create it, with every key that is referred to",
        )


def _keys(
    parts: Parts, found: Document, references: Sequence[Reference]
) -> Iterator[Diagnosis]:
    subject = subject_of(found)
    data = kinds.data_of(found)
    # An example without values is what a repository must have.
    may_be_empty = not parts.documents.is_live or found.get("kind") == kinds.CONFIG_MAP
    for key, needed_by in {each.key: each.needed_by for each in references}.items():
        if key is None:
            continue
        if key not in data:
            yield error(
                subject,
                f"has no key {key}; {needed_by} needs it",
                f"add it; it has {', '.join(sorted(data)) or 'none'}",
            )
        elif not data[key] and not may_be_empty:
            yield error(
                subject, f"its key {key} is empty; {needed_by} needs it", "fill it"
            )


# -- The function -------------------------------------------------------------------


def _function(parts: Parts, function: Document) -> Iterator[Diagnosis]:
    is_knative = kinds.kind_of(function) == kinds.KNATIVE_SERVICE
    if is_knative:
        yield from is_ready(parts, function)
        yield from _front_door(function)
    else:
        yield from _replicas(parts, function)
    try:
        settings = settings_of_pod(parts, function)
    except SettingsError:
        # Told already.
        return
    yield from _deadlines(parts, function, settings)
    if is_knative:
        yield from _room(parts, function, settings)


def _front_door(function: Document) -> Iterator[Diagnosis]:
    if at(function, "metadata", "labels", _VISIBILITY) != "cluster-local":
        yield error(
            subject_of(function),
            "can be reached from outside the cluster: anybody may post orders",
            f"set the label {_VISIBILITY}: cluster-local",
        )


def _replicas(parts: Parts, deployment: Document) -> Iterator[Diagnosis]:
    """Whether a Deployment has pods that are available."""
    subject = subject_of(deployment)
    if not parts.documents.is_live:
        yield skipped(subject, "whether its pods are available, only a cluster tells")
        return
    available = number(at(deployment, "status", "availableReplicas")) or 0
    if available < 1:
        yield error(
            subject,
            "has no pod that is available",
            f"kubectl describe deployment {kinds.name_of(deployment)}",
        )
    else:
        yield ok(subject, f"{available:g} pods are available")


def _deadlines(
    parts: Parts, function: Document, settings: Settings
) -> Iterator[Diagnosis]:
    """What the settings say of other objects must be what those objects say."""
    is_knative = kinds.kind_of(function) == kinds.KNATIVE_SERVICE
    subject = subject_of(function)
    pod = kinds.pod_spec(function)
    # Knative's default, and what it makes the grace period of its pods from, too.
    request_s = number(pod.get("timeoutSeconds")) or 300.0
    grace_s = number(pod.get("terminationGracePeriodSeconds")) or 30.0
    delivery = Delivery.of(parts.source) if parts.source is not None else None
    delivery_s = delivery.timeout_s if delivery is not None else None
    chain = [
        ("RECHARGE_API_DEADLINE_S", settings.recharge_api_deadline_s),
        (LEASE, settings.ledger_lease_s),
        ("delivery.timeout of the KafkaSource", delivery_s),
        ("timeoutSeconds of the Revision", request_s if is_knative else None),
    ]
    problems = list(_in_order(subject, chain))
    drain = [
        ("RECHARGE_API_DEADLINE_S", settings.recharge_api_deadline_s),
        ("SERVER_GRACEFUL_TIMEOUT_S", settings.server_graceful_timeout_s),
        (
            "timeoutSeconds of the Revision, which is also its pods' grace period"
            if is_knative
            else "terminationGracePeriodSeconds",
            request_s if is_knative else grace_s,
        ),
    ]
    problems += _in_order(subject, drain)
    yield from problems
    if not problems:
        links = (f"{name} ({value:g})" for name, value in chain if value is not None)
        yield ok(subject, " < ".join(links))
    told_s, name = settings.event_delivery_timeout_s, "EVENT_DELIVERY_TIMEOUT_S"
    if delivery_s is not None and delivery_s != told_s:
        yield _told_otherwise(subject, name, told_s, delivery_s)
    # These are upper ends: more than is told does no harm.
    if is_knative:
        told_s, name = settings.server_request_timeout_s, "SERVER_REQUEST_TIMEOUT_S"
        real_s = request_s
    else:
        told_s, name = settings.server_termination_grace_s, "SERVER_TERMINATION_GRACE_S"
        real_s = grace_s
    if real_s < told_s:
        yield _told_otherwise(subject, name, told_s, real_s)
    if delivery is not None and delivery_s is not None:
        yield from _given_up(subject, settings, delivery.longest_pause_s + delivery_s)


def _in_order(
    subject: str, chain: Sequence[tuple[str, float | None]]
) -> Iterator[Diagnosis]:
    known = [(name, value) for name, value in chain if value is not None]
    for (low, low_s), (high, high_s) in pairwise(known):
        if not low_s < high_s:
            yield error(
                subject,
                f"{low} ({low_s:g} s) must be less than {high} ({high_s:g} s)",
                "an order may be given up on while it can still be executed: change "
                "one of the two",
            )


def _told_otherwise(subject: str, name: str, told_s: float, real_s: float) -> Diagnosis:
    return warning(
        subject,
        f"{name} says {told_s:g}, but the object says {real_s:g}: the check at the "
        "pod's start compares with a number that isn't so",
        f"set {name}: {real_s:g}",
    )


def _given_up(
    subject: str, settings: Settings, longest_s: float
) -> Iterator[Diagnosis]:
    if settings.event_redelivery_max_s < longest_s:
        yield error(
            subject,
            f"EVENT_REDELIVERY_MAX_S ({settings.event_redelivery_max_s:g}) is less "
            f"than the source's longest pause plus one delivery ({longest_s:g} s): "
            "the resolver takes orders up that the source still has",
            f"set EVENT_REDELIVERY_MAX_S: {longest_s:.0f}",
        )


def _room(parts: Parts, function: Document, settings: Settings) -> Iterator[Diagnosis]:
    """Concurrency and scale against threads and partitions."""
    subject = subject_of(function)
    at_once = number(kinds.pod_spec(function).get("containerConcurrency")) or 0
    if not 0 < at_once <= settings.server_threads:
        yield error(
            subject,
            f"containerConcurrency is {at_once:g}"
            f"{' (no limit)' if not at_once else ''}, a pod has "
            f"{settings.server_threads} threads: what waits in a pod loses its time",
            f"set containerConcurrency: {settings.server_threads}",
        )
        return
    scale = _scale(function)
    if scale.get("min-scale", 0) < 1:
        yield warning(
            subject,
            "may be scaled to no pod: the first order waits for a cold start",
            f"set the annotation {_SCALE}min-scale: at least 1",
        )
    pods_max = scale.get("max-scale", 0)
    if not pods_max:
        yield warning(
            subject,
            "has no upper bound of pods, and so of connections to the database",
            f"set the annotation {_SCALE}max-scale",
        )
    elif parts.partitions is not None and pods_max * at_once < parts.partitions:
        yield warning(
            subject,
            f"{pods_max:g} pods of {at_once:g} threads serve {pods_max * at_once:g} "
            f"of {parts.partitions} partitions at once",
            "raise max-scale or threads; see `topup plan`",
        )


def scale_max(parts: Parts) -> int | None:
    """How many pods of the function there can be; None without an upper bound."""
    function = parts.function
    if function is None:
        return None
    if kinds.kind_of(function) == kinds.KNATIVE_SERVICE:
        return int(_scale(function)["max-scale"]) or None
    for each in parts.documents.of_kind(kinds.SCALED_OBJECT):
        if at(each, "spec", "scaleTargetRef", "name") == kinds.name_of(function):
            return int(number(at(each, "spec", "maxReplicaCount")) or 100)
    return int(number(at(function, "spec", "replicas")) or 1)


def _scale(function: Document) -> Mapping[str, float]:
    """The revision's bounds; Knative reads both spellings of each."""
    annotations = at(function, "spec", "template", "metadata", "annotations")
    found: dict[str, float] = {}
    for name, old in (("min-scale", "minScale"), ("max-scale", "maxScale")):
        value: Any = at(annotations, _SCALE + name) or at(annotations, _SCALE + old)
        found[name] = number(value) or 0
    return found


# -- The resolver -------------------------------------------------------------------


def _resolver(parts: Parts, resolver: Document) -> Iterator[Diagnosis]:
    yield from _replicas(parts, resolver)
    if parts.function is None:
        return
    theirs = kinds.environment(parts.documents, parts.function)
    ours = kinds.environment(parts.documents, resolver)
    for name in _SHARED:
        if ours.get(name) != theirs.get(name):
            yield error(
                subject_of(resolver),
                f"{name} is {ours.get(name) or 'not set'}, in the function "
                f"{theirs.get(name) or 'not set'}: each breaks what the other relies "
                "on",
                "give both the same ConfigMap",
            )
