"""A real HTTPS server that answers as the Kubernetes API does, for reading.

Owns discovery, lists, single objects and refusals, from a list of documents. Must
never accept a write, and never be kinder than the real one: items of a list name
neither their API nor their kind, a secret's data is base64, and who has no token gets
401.
"""

import base64
import json
import re
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import trustme
import yaml

TOKEN: Final = "sesame"
Document = dict[str, Any]

#: API -> resource -> kind; what a cluster with everything installed serves.
SERVED: Final[Mapping[str, Mapping[str, str]]] = {
    "v1": {"secrets": "Secret", "configmaps": "ConfigMap", "services": "Service"},
    "apps/v1": {"deployments": "Deployment"},
    "autoscaling/v2": {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
    "batch/v1": {"cronjobs": "CronJob", "jobs": "Job"},
    "sources.knative.dev/v1": {
        "kafkasources": "KafkaSource",
        "kafkasources/scale": "Scale",
    },
    "eventing.knative.dev/v1alpha1": {"kafkasinks": "KafkaSink"},
    "serving.knative.dev/v1": {"services": "Service"},
    "keda.sh/v1alpha1": {
        "scaledobjects": "ScaledObject",
        "triggerauthentications": "TriggerAuthentication",
    },
    "kafka.strimzi.io/v1": {"kafkatopics": "KafkaTopic"},
}
_PATH: Final = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<api>[^/]+/[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?)?"
)


class KubernetesApi:
    """What the server knows; a test may change any of it before it asks."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = list(documents)
        self.served = {api: dict(resources) for api, resources in SERVED.items()}
        #: Resources, or `resource/name`, that are answered with a status of their own.
        self.refused: dict[str, int] = {}
        #: Every method and path that was asked for.
        self.asked: list[str] = []

    def answer(self, path: str, token: str) -> tuple[int, Document]:
        """Status and body of a GET."""
        if token != f"Bearer {TOKEN}":
            return 401, _status(401, "Unauthorized")
        if group := re.fullmatch(r"/apis/([^/]+)", path):
            return self._group(group[1])
        parts = _PATH.fullmatch(path)
        if parts is None:
            return 404, _status(404, "NotFound")
        api = parts["core"] or parts["api"]
        if api not in self.served:
            return 404, _status(404, "NotFound")
        if parts["resource"] is None:
            return 200, self._resources(api)
        return self._objects(
            api, parts["namespace"], parts["resource"], parts["name"] or ""
        )

    def _group(self, group: str) -> tuple[int, Document]:
        versions = [api for api in self.served if api.startswith(f"{group}/")]
        if not versions:
            return 404, _status(404, "NotFound")
        named = [{"groupVersion": api, "version": api[-2:]} for api in versions]
        return 200, {"kind": "APIGroup", "apiVersion": "v1", "versions": named}

    def _resources(self, api: str) -> Document:
        named = [
            {"name": name, "kind": kind, "namespaced": True, "verbs": ["get", "list"]}
            for name, kind in self.served[api].items()
        ]
        return {"kind": "APIResourceList", "groupVersion": api, "resources": named}

    def _objects(
        self, api: str, namespace: str, resource: str, name: str
    ) -> tuple[int, Document]:
        for refused in (resource, f"{resource}/{name}"):
            if status := self.refused.get(refused):
                return status, _status(status, "Forbidden")
        kind = self.served[api].get(resource)
        if kind is None:
            return 404, _status(404, "NotFound")
        found = [
            _as_answered(each)
            for each in self.documents
            if (each["apiVersion"], each["kind"]) == (api, kind)
            and each["metadata"]["namespace"] == namespace
            and name in {"", each["metadata"]["name"]}
        ]
        if not name:
            for each in found:
                del each["apiVersion"], each["kind"]
            return 200, {"kind": f"{kind}List", "apiVersion": api, "items": found}
        return (200, found[0]) if found else (404, _status(404, "NotFound"))


def _as_answered(document: Document) -> Document:
    answered = dict(document)
    plain = answered.pop("stringData", None)
    if plain is not None:
        answered["data"] = {
            name: base64.b64encode(value.encode()).decode()
            for name, value in plain.items()
        }
    return answered


def _status(code: int, reason: str) -> Document:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason}


@contextmanager
def running_kubernetes_api(
    directory: Path, documents: Sequence[Document]
) -> Iterator[tuple[KubernetesApi, Path]]:
    """The API over TLS, and a kubeconfig in `directory` that leads to it."""
    api = KubernetesApi(documents)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority, certificate = _certificate()
    certificate.configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20
        # Headers and body are two writes.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            api.asked.append(f"GET {self.path}")
            token = self.headers.get("Authorization", "")
            status, document = api.answer(self.path, token)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield (
            api,
            write_kubeconfig(directory, server.server_port, authority.cert_pem.bytes()),
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@cache
def _certificate() -> tuple[trustme.CA, trustme.LeafCert]:
    authority = trustme.CA()
    return authority, authority.issue_cert("127.0.0.1")


def write_kubeconfig(
    directory: Path, port: int, ca: bytes, *, token: str = TOKEN
) -> Path:
    """A kubeconfig with one context, `test`."""
    path = directory / f"kubeconfig-{port}-{token}"
    cluster = {
        "server": f"https://127.0.0.1:{port}",
        "certificate-authority-data": base64.b64encode(ca).decode(),
    }
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    path.write_text(yaml.safe_dump(document), "utf-8")
    return path
