"""The manifests as kubectl renders them, and what is applied together.

Owns the rendering and the addressing of fields; must never decide what is right.
"""

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
#: One object of Kubernetes; free-form by nature.
Document = dict[str, Any]

#: Every folder that `kubectl apply -k` is said to take, or that one of them is made of.
FOLDERS: Final = sorted(
    str(path.parent.relative_to(ROOT))
    for folder in ("manifests", "keda", "certs")
    for path in (ROOT / folder).rglob("kustomization.yaml")
    if "kind: Component" not in path.read_text("utf-8")
)
_EVERYWHERE: Final = ("manifests/secrets.example", "manifests/keep", "certs")
#: What the README applies together.
INSTALLATIONS: Final[dict[str, tuple[str, ...]]] = {
    "laptop": (
        "manifests/overlays/laptop",
        "manifests/kafka-laptop",
        "manifests/laptop-services",
        "manifests/first-order",
        *_EVERYWHERE,
    ),
    "production": (
        "manifests/overlays/production",
        "manifests/kafka",
        "keda",
        *_EVERYWHERE,
    ),
    "production-mtls": (
        "manifests/overlays/production-mtls",
        "manifests/kafka-mtls",
        "keda/source-mtls",
        *_EVERYWHERE,
    ),
    "production-oidc": (
        "manifests/overlays/production-oidc",
        "manifests/kafka",
        "keda/source",
        *_EVERYWHERE,
    ),
    "deployment": (
        "manifests/overlays/deployment",
        "manifests/kafka",
        "keda/deployment",
        *_EVERYWHERE,
    ),
}


@functools.cache
def _rendered(folder: str) -> str:
    assert shutil.which("kubectl"), "kubectl is missing: install it, 1.27 or newer"
    command = ["kubectl", "kustomize", str(ROOT / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return done.stdout


def render(folder: str) -> list[Document]:
    """What `kubectl apply -k` would send, free to be changed."""
    # libyaml: the pure reader takes ten times as long, and this runs often.
    return list(yaml.load_all(_rendered(folder), Loader=yaml.CSafeLoader))


@functools.cache
def _installed(name: str) -> tuple[Document, ...]:
    return tuple(each for folder in INSTALLATIONS[name] for each in render(folder))


def installation(name: str) -> list[Document]:
    """All that is applied together, free to be changed."""
    return copy.deepcopy(list(_installed(name)))


def address(document: Document) -> str:
    """`Kind/name`; Knative's Service is `KnativeService`, Kubernetes' own `Service`."""
    kind = document["kind"]
    if document["apiVersion"].startswith("serving.knative.dev/"):
        kind = f"Knative{kind}"
    return f"{kind}/{document['metadata']['name']}"


def of_kind(documents: Iterable[Document], *kinds: str) -> list[Document]:
    """The documents of these kinds, as `address` names them."""
    return [each for each in documents if address(each).partition("/")[0] in kinds]


def find(documents: Iterable[Document], wanted: str) -> Document | None:
    """The document of this address, if there is one."""
    return next((each for each in documents if address(each) == wanted), None)


def field(value: Any, path: str, default: Any = None) -> Any:
    """What is at `spec.list.0.name`; the default where there is nothing.

    A name that has dots itself is written with `|` instead of them.
    """
    for step in path.split("."):
        name = step.replace("|", ".")
        if isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return default
    return value


def put(value: Any, path: str, new: Any) -> None:
    """Set what is at `path`, which must be there up to its last step; None removes."""
    *steps, last = [step.replace("|", ".") for step in path.split(".")]
    for step in steps:
        value = value[int(step)] if isinstance(value, list) else value[step]
    key = int(last) if isinstance(value, list) else last
    if new is None:
        del value[key]
    elif isinstance(value, list) and key == len(value):
        value.append(new)
    else:
        value[key] = new
