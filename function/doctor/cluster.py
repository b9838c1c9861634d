"""Reads what `topup doctor` judges: a live cluster, or rendered manifests.

Owns the talking to the Kubernetes API; must never change anything there, keep a
secret's value, or let a refusal become an exception: what can't be read is told.
"""

import json
import sys
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from urllib3.exceptions import HTTPError

from function.doctor import documents as kinds
from function.doctor.diagnosis import Diagnosis, unknown
from function.doctor.documents import Document, Documents, Reference, at, items, kind_of
from function.errors import DocumentsUnreadable

_MISSING_PACKAGE: Final = (
    "the package `{name}` is missing, which the function itself does not need: "
    "pip install '.[cluster]'"
)
#: For the connection, and for each answer.
_TIMEOUT_S: Final = (5.0, 15.0)

#: What is listed in the namespace: API, resource, kind.
_RESOURCES: Final = (
    ("sources.knative.dev/v1", "kafkasources", kinds.KAFKA_SOURCE),
    ("eventing.knative.dev/v1alpha1", "kafkasinks", kinds.KAFKA_SINK),
    ("serving.knative.dev/v1", "services", kinds.KNATIVE_SERVICE),
    ("keda.sh/v1alpha1", "scaledobjects", kinds.SCALED_OBJECT),
    ("keda.sh/v1alpha1", "triggerauthentications", kinds.TRIGGER_AUTHENTICATION),
    ("kafka.strimzi.io/v1", "kafkatopics", kinds.KAFKA_TOPIC),
    ("apps/v1", "deployments", kinds.DEPLOYMENT),
    ("autoscaling/v2", "horizontalpodautoscalers", kinds.AUTOSCALER),
    ("batch/v1", "cronjobs", kinds.CRON_JOB),
    ("batch/v1", "jobs", kinds.JOB),
    ("v1", "services", kinds.SERVICE),
)
#: These are read by name: listing all secrets is a right that a doctor needn't have.
_BY_NAME: Final = {kinds.SECRET: "secrets", kinds.CONFIG_MAP: "configmaps"}

#: Public words that a secret may hold, and which a check wants to see.
_MECHANISMS: Final = frozenset(
    {"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"}
)
_PEM: Final = "-----BEGIN "


# -- Rendered manifests -------------------------------------------------------------


def read_offline(path: str, namespace: str | None = None) -> Documents:
    """The documents of a folder, a file, or `-` for standard input.

    Without a namespace it is that of the KafkaSource among them.

    Raises:
        DocumentsUnreadable: nothing there, no YAML, or a folder for kustomize that
            has not been rendered; says what to do.

    """
    try:
        import yaml  # noqa: PLC0415
    except ImportError:
        raise DocumentsUnreadable(_MISSING_PACKAGE.format(name="PyYAML")) from None
    objects: list[Document] = []
    for origin, text in _texts(path):
        try:
            found = list(yaml.safe_load_all(text))
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            line = f", line {place.line + 1}" if place else ""
            raise DocumentsUnreadable(f"{origin} is no YAML{line}") from None
        objects += _flat(found)
    if not objects:
        raise DocumentsUnreadable(f"{path} has no Kubernetes object in it")
    shown = [_without_values(each) for each in objects]
    if namespace is None:
        sources = [each for each in shown if kind_of(each) == kinds.KAFKA_SOURCE]
        told = [kinds.namespace_of(each) for each in sources]
        namespace = next(filter(None, told), kinds.NAMESPACE)
    return Documents(namespace=namespace, objects=shown, is_live=False)


def _texts(path: str) -> Iterator[tuple[str, str]]:
    if path == "-":
        yield "standard input", sys.stdin.read()
        return
    root = Path(path)
    if (root / "kustomization.yaml").exists():
        raise DocumentsUnreadable(
            f"{path} is not rendered: kubectl kustomize {path} | topup doctor "
            "--offline -"
        )
    files = [root]
    if root.is_dir():
        wanted = {".yaml", ".yml", ".json"}
        files = sorted(each for each in root.rglob("*") if each.suffix in wanted)
    for file in files:
        try:
            yield str(file), file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is no text"
            raise DocumentsUnreadable(f"{file}: {reason}") from None


def _flat(found: Iterable[object]) -> Iterator[Document]:
    """The objects, also those within a List."""
    for each in found:
        if not isinstance(each, Mapping) or not each.get("kind"):
            continue
        if str(each["kind"]).endswith("List") and "items" in each:
            yield from _flat(items(each["items"]))
        else:
            yield each


def _without_values(document: Document) -> Document:
    """A Secret with the names of its keys, and no value that is one's own to know."""
    if kind_of(document) != kinds.SECRET:
        return document
    # stringData is what a person writes; data, base64, what the cluster answers.
    plain = at(document, "stringData")
    encoded = at(document, "data")
    shown: dict[str, str] = {}
    if isinstance(encoded, Mapping):
        shown |= {str(n): _hint(_decoded(value)) for n, value in encoded.items()}
    if isinstance(plain, Mapping):
        shown |= {str(n): _hint(str(value or "")) for n, value in plain.items()}
    metadata = {
        name: at(document, "metadata", name)
        for name in ("name", "namespace")
        if at(document, "metadata", name)
    }
    kept = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
    return {**kept, "data": shown}


def _decoded(value: object) -> str:
    try:
        return b64decode(str(value or "")).decode("utf-8", errors="replace")
    except ValueError:
        return str(value)


def _hint(value: str) -> str:
    """What may be known of a value: that it is there, and what sort of thing it is."""
    if not value.strip():
        return ""
    if value in _MECHANISMS:
        return value
    if value.startswith(_PEM):
        return value.splitlines()[0]
    return kinds.HIDDEN


# -- A live cluster -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """Which cluster, and as whom; as kubectl would choose it where nothing is said."""

    namespace: str
    context: str | None = None
    kubeconfig: str | None = None


def read_live(access: Access) -> tuple[Documents | None, list[Diagnosis]]:
    """Read everything that the checks look at, and tell what could not be read.

    None instead of the documents: the cluster did not answer, nothing is known of it.

    Raises:
        DocumentsUnreadable: the package `kubernetes` is missing.

    """
    try:
        import kubernetes  # noqa: PLC0415
    except ImportError:
        raise DocumentsUnreadable(_MISSING_PACKAGE.format(name="kubernetes")) from None
    try:
        client = _client(kubernetes, access)
    # A kubeconfig can be wrong in as many ways as it has plugins.
    except Exception as error:  # noqa: BLE001
        return None, [
            unknown(
                "cluster",
                f"no way to a cluster is set up ({type(error).__name__})",
                "choose one with --kubeconfig and --context, as kubectl would",
            )
        ]
    reader = _Reader(client, access.namespace)
    try:
        reader.read()
    except _Unreachable as error:
        reader.told.append(unknown("cluster", str(error), error.todo))
        return None, reader.told
    finally:
        client.close()
    return reader.documents(), reader.told


def _client(kubernetes: Any, access: Access) -> Any:
    configuration = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_kube_config(
            config_file=access.kubeconfig,
            context=access.context,
            client_configuration=configuration,
            persist_config=False,
        )
    except kubernetes.config.ConfigException:
        if access.kubeconfig or access.context:
            raise
        # Without a kubeconfig we may be in a pod, which has an account of its own.
        kubernetes.config.load_incluster_config(client_configuration=configuration)
    # A doctor who asks thrice takes thrice as long to say that nobody answers.
    configuration.retries = False
    return kubernetes.client.ApiClient(configuration)


class _Unreachable(Exception):
    """Nothing more can be learnt from this cluster."""

    def __init__(self, message: str, todo: str) -> None:
        super().__init__(message)
        self.todo = todo


class _Refused(Exception):
    """One thing can't be read; the message says why."""


class _Reader:
    """One pass over the cluster; everything by GET."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._objects: list[Document] = []
        self._unread: set[str] = set()
        self._served: dict[str, frozenset[str]] = {}
        self.told: list[Diagnosis] = []

    def documents(self) -> Documents:
        return Documents(
            namespace=self._namespace,
            objects=tuple(self._objects),
            unread=frozenset(self._unread),
            served=dict(self._served),
        )

    def read(self) -> None:
        for api, resource, kind in _RESOURCES:
            if self._is_served(api, resource, kind):
                self._list(api, resource, kind, self._namespace)
        source = kinds.parts_of(self.documents()).source
        kafka = kinds.namespace_of_kafka(source)
        topics = ("kafka.strimzi.io/v1", "kafkatopics")
        if kafka not in {"", self._namespace} and self._served.get(topics[0]):
            self._list(*topics, kinds.KAFKA_TOPIC, kafka)
        for name in (kinds.FEATURES_OF_KAFKA, kinds.FEATURES):
            self._get(kinds.CONFIG_MAP, name, kinds.EVENTING_NAMESPACE)
        for reference in self._references():
            if self.documents().find(reference.kind, reference.name) is None:
                self._get(reference.kind, reference.name, self._namespace)

    def _references(self) -> list[Reference]:
        """What the objects refer to, each name once."""
        found: dict[tuple[str, str], Reference] = {}
        for each in kinds.references(kinds.parts_of(self.documents())):
            if each.name:
                found.setdefault((each.kind, each.name), each)
        return list(found.values())

    def _is_served(self, api: str, resource: str, kind: str) -> bool:
        if api not in self._served:
            try:
                document = self._ask(_root(api))
            except _Refused as refused:
                self._tell(kind, f"discover {api}", refused)
                return False
            if document is None:
                self._note_versions(api)
                return False
            names = [str(e.get("name")) for e in items(document.get("resources"))]
            self._served[api] = frozenset(names)
        return resource in self._served[api]

    def _note_versions(self, api: str) -> None:
        """The versions that are served instead, without their resources."""
        group = api.partition("/")[0]
        try:
            document = self._ask(f"/apis/{group}") or {}
        except _Refused:
            document = {}
        for each in items(document.get("versions")):
            self._served.setdefault(str(each.get("groupVersion")), frozenset())

    def _list(self, api: str, resource: str, kind: str, namespace: str) -> None:
        try:
            document = self._ask(f"{_root(api)}/namespaces/{namespace}/{resource}")
        except _Refused as refused:
            self._tell(kind, f"list {resource} in {namespace}", refused)
            return
        for each in items((document or {}).get("items")):
            # The items of a list name neither their API nor their kind.
            own = {"apiVersion": api, "kind": kind.partition(".")[0], **each}
            self._objects.append(own)

    def _get(self, kind: str, name: str, namespace: str) -> None:
        resource = _BY_NAME[kind]
        try:
            found = self._ask(f"/api/v1/namespaces/{namespace}/{resource}/{name}")
        except _Refused as refused:
            what = f"get {resource} {name} in {namespace}"
            self._tell(f"{kind}/{name}", what, refused)
            return
        if found is not None:
            own = {"apiVersion": "v1", "kind": kind, **found}
            self._objects.append(_without_values(own))

    def _tell(self, unread: str, what: str, refused: _Refused) -> None:
        self._unread.add(unread)
        message = f"can't {what} ({refused}): what depends on it was not checked"
        todo = "grant the right, or run this as somebody who has it"
        self.told.append(unknown(unread, message, todo))

    def _ask(self, path: str) -> Document | None:
        """What a path answers; None if there is nothing."""
        from kubernetes.client import ApiException  # noqa: PLC0415

        # The client's own serialisation adds the address and the credentials.
        method, url, headers, body, post = self._client.param_serialize(
            "GET",
            path,
            header_params={"Accept": "application/json"},
            auth_settings=["BearerToken"],
        )
        try:
            answer = self._client.call_api(
                method, url, headers, body, post, _request_timeout=_TIMEOUT_S
            )
            text = answer.read()
        except (ApiException, HTTPError, OSError) as error:
            raise _Unreachable(
                f"{_host(url)} does not answer ({_reason(error)})",
                "check the address, its certificate and the network; is this the "
                "cluster that you mean?",
            ) from None
        return _document(answer.status, text, url)


def _document(status: int, text: bytes, url: str) -> Document | None:
    match status:
        case 200:
            pass
        case 401:
            raise _Unreachable(
                f"{_host(url)} does not know who we are (401)",
                "log in again, or choose another --context",
            )
        case 403:
            raise _Refused("forbidden")
        case 404:
            return None
        case _:
            raise _Refused(f"the API server answers {status}")
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _Unreachable(
            f"{_host(url)} is no Kubernetes API: it doesn't answer JSON",
            "check the address in the kubeconfig, and proxies on the way",
        )
    return document


def _root(api: str) -> str:
    return f"/apis/{api}" if "/" in api else f"/api/{api}"


def _host(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _reason(error: BaseException) -> str:
    """The innermost error's class, which tells a refusal from a certificate."""
    cause = getattr(error, "reason", None)
    while isinstance(cause, BaseException):
        error, cause = cause, getattr(cause, "reason", None)
    # The client's own error names the class of an error of TLS in its text.
    named = str(cause).partition("\n")[0] if cause else ""
    return named if named.isidentifier() else type(error).__name__
