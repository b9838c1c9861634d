"""What the manifests allow a pod of the function: read from them, so never another.

Owns where these values stand; must never decide whether they are right.
"""

from typing import Any, Final

import yaml

from demo.server_process import PROJECT

#: Every manifest that runs the function's container.
_WORKLOADS: Final = (
    PROJECT / "manifests" / "base" / "function-service.yaml",
    PROJECT / "manifests" / "overlays" / "deployment" / "function-deployment.yaml",
)
_KIB_OF: Final = {"Ki": 1, "Mi": 1024, "Gi": 1024 * 1024}


def memory_limit_kib() -> int:
    """The smallest limit of memory that the function's container is given, in KiB."""
    limits = [each["resources"]["limits"]["memory"] for each in _containers()]
    return min(int(limit[:-2]) * _KIB_OF[limit[-2:]] for limit in limits)


def liveness_timeout_s() -> float:
    """How long the most impatient liveness probe waits for its answer."""
    return min(float(each["livenessProbe"]["timeoutSeconds"]) for each in _containers())


def _containers() -> list[dict[str, Any]]:
    found = []
    for path in _WORKLOADS:
        (document,) = yaml.safe_load_all(path.read_text("utf-8"))
        (container,) = document["spec"]["template"]["spec"]["containers"]
        found.append(container)
    return found
