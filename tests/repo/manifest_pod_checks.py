"""What the manifests give each pod is what the code takes.

Each check takes all that is applied together and says in words what is wrong.
Must never ask a cluster.
"""

import itertools
import tempfile
from pathlib import Path

from function.api_profile import load_profile
from function.config import Settings, settings_table
from function.errors import SettingsError
from tests.repo.manifest_reading import (
    CLUSTER_WIDE,
    NAMESPACE,
    QUEUE_PROXY_QUIET_S,
    SETTINGS,
    SOURCE,
    containers,
    data_of,
    keys_there,
    ours,
    references,
    seconds,
    settings_of,
    workloads,
)
from tests.repo.rendered import Document, address, field, find, of_kind


def check_namespace(documents: list[Document]) -> list[str]:
    """Everything is in one namespace, and no two objects have one name."""
    problems = [
        f"{address(each)} is in {field(each, 'metadata.namespace')}"
        for each in documents
        if each["kind"] not in CLUSTER_WIDE
        and field(each, "metadata.namespace") != NAMESPACE
    ]
    names = sorted(address(each) for each in documents)
    return problems + [f"{a} twice" for a, b in itertools.pairwise(names) if a == b]


def check_references(documents: list[Document]) -> list[str]:
    """Each Secret and ConfigMap that is referred to is there, with that key."""
    there = keys_there(documents)
    problems = []
    for document in documents:
        for name, key in references(document.get("spec", {})):
            if name not in there:
                problems.append(f"{address(document)}: there is no {name}")
            elif key and key not in there[name]:
                problems.append(f"{address(document)}: {name} has no key {key}")
    return problems


def check_kept(documents: list[Document]) -> list[str]:
    """What must never be deleted by mistake is named by a policy that is in force."""
    policy = find(documents, "ValidatingAdmissionPolicy/topup-keep")
    binding = find(documents, "ValidatingAdmissionPolicyBinding/topup-keep")
    kept = {
        (resource, name)
        for rule in field(policy, "spec.matchConstraints.resourceRules", [])
        if "DELETE" in rule["operations"]
        for resource in rule["resources"]
        for name in rule["resourceNames"]
    }
    problems = []
    if kept != {("kafkasources", "topup-source"), ("namespaces", NAMESPACE)}:
        problems.append("the source or the namespace may be deleted")
    if field(binding, "spec.policyName") != "topup-keep":
        problems.append("the policy is bound to nothing")
    if field(binding, "spec.validationActions") != ["Deny"]:
        problems.append("the policy only talks")
    return problems


def check_accounts(documents: list[Document]) -> list[str]:
    """Each workload has its own identity and its own account of the database."""
    problems = []
    seen: dict[str, str] = {}
    for name, template, container in ours(documents):
        role = name.rpartition("/topup-")[2]
        account = template["spec"].get("serviceAccountName")
        if account != f"topup-{role}" or not find(
            documents, f"ServiceAccount/{account}"
        ):
            problems.append(f"{name}: has no service account of its own")
        reference: Document = next(
            (e for e in container["env"] if e["name"] == "LEDGER_DATABASE_URL"), {}
        )
        secret = field(reference, "valueFrom.secretKeyRef.name")
        if secret != f"topup-{role}-database":
            problems.append(f"{name}: takes the database's account from {secret}")
        mounted = [field(v, "secret.secretName") for v in template["spec"]["volumes"]]
        if secret not in mounted:
            problems.append(f"{name}: mounts another password than its address's")
        if seen.setdefault(str(secret), name) != name:
            problems.append(f"{name}: shares its account with {seen[str(secret)]}")
    return problems


def check_secrets_hold_nothing(documents: list[Document]) -> list[str]:
    """No value in the tree is one that must not be known."""
    return [
        f"{address(each)}: {key} has a value"
        for each in of_kind(documents, "Secret")
        for key, value in data_of(each).items()
        if value and address(each) != "Secret/topup-source-sasl"
    ]


def check_images(documents: list[Document]) -> list[str]:
    """One version of the function for all, and no tag that moves by itself."""
    problems = [
        f"{name}: {container['image']} is not pinned"
        for name, template in workloads(documents)
        for container in containers(template)
        if ":" not in container["image"].rpartition("/")[2]
        or container["image"].endswith(":latest")
    ]
    images = {container["image"] for _, _, container in ours(documents)}
    if len(images) != 1:
        problems.append(f"more than one version of the function: {sorted(images)}")
    return problems


def check_deadlines(documents: list[Document]) -> list[str]:
    """The deadlines of the settings are those of the source and of the pods."""
    settings = settings_of(documents)
    source = find(documents, SOURCE) or {}
    problems = []
    timeout_s = seconds(field(source, "spec.delivery.timeout", ""))
    if timeout_s != float(settings["EVENT_DELIVERY_TIMEOUT_S"]):
        problems.append("delivery.timeout is not EVENT_DELIVERY_TIMEOUT_S")
    grace_s = float(settings["SERVER_TERMINATION_GRACE_S"])
    service = find(documents, "KnativeService/topup-function")
    if service:
        revision = field(service, "spec.template.spec", {})
        request_s = field(revision, "timeoutSeconds", 0)
        if request_s != float(settings["SERVER_REQUEST_TIMEOUT_S"]):
            problems.append("timeoutSeconds is not SERVER_REQUEST_TIMEOUT_S")
        # The Revision's timeout is its pods' termination grace, too.
        if request_s - QUEUE_PROXY_QUIET_S < grace_s:
            problems.append("the Revision's pods are killed while they drain")
        if str(field(revision, "containerConcurrency")) != settings["SERVER_THREADS"]:
            problems.append("containerConcurrency is not SERVER_THREADS")
    deployment = find(documents, "Deployment/topup-function")
    if deployment:
        pod = field(deployment, "spec.template.spec", {})
        asleep_s = field(pod, "containers.0.lifecycle.preStop.sleep.seconds", 0)
        if field(pod, "terminationGracePeriodSeconds", 30) - asleep_s < grace_s:
            problems.append("the Deployment's pods are killed while they drain")
    resolver = find(documents, "Deployment/topup-resolver")
    grace = field(resolver, "spec.template.spec.terminationGracePeriodSeconds", 30)
    deadline_s = float(settings["RECHARGE_API_DEADLINE_S"])
    if grace <= deadline_s + float(settings["LEDGER_LEASE_MARGIN_S"]):
        problems.append("the resolver is killed before its lease ends")
    return problems


def check_settings_exist(documents: list[Document]) -> list[str]:
    """Each variable that our containers are given is a setting."""
    known = {name for name, _, _ in settings_table()}
    given = set(data_of(find(documents, SETTINGS)))
    for _, _, container in ours(documents):
        given |= {each["name"] for each in container.get("env", [])}
    return [f"{name} is no setting" for name in sorted(given - known)]


def environment(
    documents: list[Document], template: Document, container: Document, root: Path
) -> dict[str, str]:
    """What the process sees, with each mounted file in `root` instead.

    A path that no volume provides stays as it is, and isn't there.
    """
    env: dict[str, str] = {}
    for source in container.get("envFrom", []):
        name = field(source, "configMapRef.name")
        env |= data_of(find(documents, f"ConfigMap/{name}"))
    for each in container.get("env", []):
        # A Secret's value is only here to be of the right form.
        env[each["name"]] = each.get("value", "mysql+pymysql://user@127.0.0.1/ledger")
    there = keys_there(documents)
    for mount in container.get("volumeMounts", []):
        volume = next(
            v for v in template["spec"]["volumes"] if v["name"] == mount["name"]
        )
        secret = field(volume, "secret.secretName")
        files = set(there.get(f"Secret/{secret}", ()))
        for source in field(volume, "projected.sources", []):
            files.add(field(source, "serviceAccountToken.path"))
            files |= {e["path"] for e in field(source, "configMap.items", [])}
        for file in files - {None}:
            local = root / mount["mountPath"].strip("/") / file
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_text("")
            inside = f"{mount['mountPath']}/{file}"
            env = {n: str(local) if v == inside else v for n, v in env.items()}
    return env


def check_environment(documents: list[Document]) -> list[str]:
    """The code itself accepts what each container is given."""
    problems = []
    for name, template, container in ours(documents):
        with tempfile.TemporaryDirectory() as folder:
            env = environment(documents, template, container, Path(folder))
            words = container.get("command", [])
            try:
                if words[:2] in (["topup", "migrate"], ["topup", "purge"]):
                    Settings.ledger_only(env)
                else:
                    load_profile(Settings.from_env(env))
            except SettingsError as error:
                problems.append(f"{name}: {error}")
            if "LEDGER_TLS_CA_FILE" not in env or "LEDGER_PASSWORD_FILE" not in env:
                problems.append(f"{name}: reaches the database without TLS or password")
    return problems


def check_pods(documents: list[Document]) -> list[str]:
    """Nobody is root, can become it, write to the image, or talk to the cluster."""
    problems = []
    for name, template in workloads(documents):
        pod = template["spec"]
        if pod.get("automountServiceAccountToken") is not False:
            problems.append(f"{name}: has the cluster's token")
        for container in containers(template):
            security = {
                **pod.get("securityContext", {}),
                **container.get("securityContext", {}),
            }
            wanted = {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            if name != "StatefulSet/topup-database":
                wanted |= {"readOnlyRootFilesystem": True, "runAsUser": 65532}
            problems += [
                f"{name}: {key} is {security.get(key)}"
                for key, value in wanted.items()
                if security.get(key) != value
            ]
            if not field(container, "resources.limits.memory"):
                problems.append(f"{name}: takes all the memory there is")
    return problems


def check_probes(documents: list[Document]) -> list[str]:
    """Liveness never asks the database; whoever serves is asked whether it is ready."""
    problems = []
    for name, _, container in ours(documents):
        if "command" in container:
            continue
        for probe, path in (("liveness", "/healthz"), ("readiness", "/readyz")):
            if field(container, f"{probe}Probe.httpGet.path") != path:
                problems.append(f"{name}: {probe} is not {path}")
        ports = [str(each["containerPort"]) for each in container.get("ports", [])]
        names = [each.get("name") for each in container.get("ports", [])]
        for probe in ("livenessProbe", "readinessProbe"):
            port = field(container, f"{probe}.httpGet.port")
            if port is not None and str(port) not in [*ports, *names]:
                problems.append(f"{name}: {probe} asks a port that is not there")
        if ports != ["8080"]:
            problems.append(f"{name}: gunicorn listens on 8080")
    return problems
