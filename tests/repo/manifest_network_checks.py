"""Who may reach whom, by the manifests: no more than is needed.

Each check takes all that is applied together and says in words what is wrong.
Must never ask a cluster.
"""

import itertools
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.repo.manifest_reading import (
    NAMESPACE,
    SETTINGS,
    SINK,
    SOURCE,
    containers,
    data_of,
    ours,
    settings_of,
    workloads,
)
from tests.repo.rendered import Document, address, field, find, of_kind


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )


def check_selectors(documents: list[Document]) -> list[str]:
    """Every selector finds pods, and every pod of ours has both kinds of policy."""
    labels = {
        name: field(template, "metadata.labels", {})
        for name, template in workloads(documents)
    }
    problems = []
    for each in of_kind(documents, "NetworkPolicy", "PodDisruptionBudget", "Service"):
        selector = field(each, "spec.podSelector") or field(each, "spec.selector", {})
        if each["kind"] == "Service":
            selector = {"matchLabels": selector}
        if not any(_selects(selector, mine) for mine in labels.values()):
            problems.append(f"{address(each)}: selects nobody")
    for name in {name for name, _, _ in ours(documents)}:
        types = {
            kind
            for policy in of_kind(documents, "NetworkPolicy")
            if _selects(policy["spec"]["podSelector"], labels[name])
            for kind in policy["spec"]["policyTypes"]
        }
        if types != {"Ingress", "Egress"}:
            problems.append(
                f"{name}: is open to {sorted({'Ingress', 'Egress'} - types)}"
            )
    return problems


def _rules(documents: list[Document], role: str, way: str) -> Iterator[Document]:
    labels = {"app.kubernetes.io/name": f"topup-{role}"}
    for policy in of_kind(documents, "NetworkPolicy"):
        if _selects(policy["spec"]["podSelector"], labels):
            yield from policy["spec"].get(way, [])


def check_ways_in(documents: list[Document]) -> list[str]:
    """Who posts reaches the function's pods, at the port where it is awaited."""
    is_knative = find(documents, "KnativeService/topup-function") is not None
    wanted = (
        {
            ("kourier-system", 8012),
            ("istio-system", 8012),
            ("knative-serving", 8012),
            ("knative-serving", 9090),
            ("monitoring", 9091),
        }
        if is_knative
        else {("knative-eventing", 8080)}
    )
    label = "namespaceSelector.matchLabels.kubernetes|io/metadata|name"
    problems = []
    found = set()
    for rule in _rules(documents, "function", "ingress"):
        if not rule.get("from") or not rule.get("ports"):
            problems.append(
                "somebody may reach the function from anywhere or everywhere"
            )
        for peer, port in itertools.product(
            rule.get("from", []), rule.get("ports", [])
        ):
            found.add((field(peer, label), port["port"]))
    # 8112 is 8012 in a cluster that encrypts its inside; the autoscaler probes at 8012.
    found = {(who, port) for who, port in found if port != 8112}
    if found != wanted:
        problems.append(f"ways in: {sorted(map(str, found ^ wanted))}")
    if list(_rules(documents, "resolver", "ingress")):
        problems.append("somebody may call the resolver")
    if is_knative:
        service = find(documents, "KnativeService/topup-function")
        label = "metadata.labels.networking|knative|dev/visibility"
        if field(service, label) != "cluster-local":
            problems.append("the function has an address outside the cluster")
    return problems


def check_ways_out(documents: list[Document]) -> list[str]:
    """DNS and the database for all, the recharge API for who calls it, nothing else."""
    problems = []
    url = urlsplit(settings_of(documents)["RECHARGE_API_URL"])
    api = url.port or {"https": 443, "http": 80}[url.scheme]
    is_oidc = "EVENTS_OIDC_AUDIENCE" in data_of(find(documents, SETTINGS))
    for role in ("function", "resolver", "migrate", "purge"):
        rules = list(_rules(documents, role, "egress"))
        ports = {
            field(port, "port") for rule in rules for port in rule.get("ports", [])
        }
        if any(not rule.get("to") or not rule.get("ports") for rule in rules):
            problems.append(f"topup-{role}: may reach anything")
        wanted = {53, 3306}
        if role in {"function", "resolver"}:
            wanted.add(api)
        if role == "function" and is_oidc:
            wanted |= {443, 6443}
        if ports != wanted:
            problems.append(f"topup-{role}: reaches {sorted(ports ^ wanted)}")
    return problems


def check_services(documents: list[Document]) -> list[str]:
    """Target ports are there, and RECHARGE_API_URL inside the cluster is a Service."""
    problems = []
    for service in of_kind(documents, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        ports = {
            port.get("name")
            for _, template in workloads(documents)
            if _selects(selector, field(template, "metadata.labels", {}))
            for container in containers(template)
            for port in container.get("ports", [])
        }
        problems += [
            f"{address(service)}: no container has the port {port['targetPort']}"
            for port in service["spec"]["ports"]
            if port["targetPort"] not in ports
        ]
    url = urlsplit(settings_of(documents)["RECHARGE_API_URL"])
    host = url.hostname or ""
    if host.endswith(f".{NAMESPACE}.svc"):
        called = find(documents, f"Service/{host.partition('.')[0]}")
        if field(called, "spec.ports.0.port") != url.port:
            problems.append("nobody listens at RECHARGE_API_URL")
    for certificate in of_kind(documents, "Certificate"):
        name = certificate["metadata"]["name"]
        names = field(certificate, "spec.dnsNames", [])
        if (
            find(documents, f"Service/{name}")
            and f"{name}.{NAMESPACE}.svc" not in names
        ):
            problems.append(f"{address(certificate)}: not for its Service")
    return problems


def check_tokens(documents: list[Document]) -> list[str]:
    """Tokens are sent if and only if they are demanded, and the source has one."""
    settings = data_of(find(documents, SETTINGS))
    sent = field(find(documents, SOURCE), "spec.sink.audience")
    demanded = settings.get("EVENTS_OIDC_AUDIENCE")
    problems = []
    if sent != demanded:
        problems.append(f"audience {sent} is sent, {demanded} is demanded")
    if not demanded:
        return problems
    subject = (
        f"system:serviceaccount:{NAMESPACE}:"
        "topup-source-oidc-sources.knative.dev-kafkasource"
    )
    if settings.get("EVENTS_OIDC_SUBJECTS") != subject:
        problems.append("the source's identity is not among the subjects")
    if not settings.get("EVENTS_OIDC_ISSUER"):
        problems.append("no issuer")
    policy = field(find(documents, "EventPolicy/topup-dead-letters"), "spec", {})
    for way, wanted in (("to", SINK), ("from", SOURCE)):
        reference = field(policy, f"{way}.0.ref", {})
        if f"{reference.get('kind')}/{reference.get('name')}" != wanted:
            problems.append(f"the policy is not {way} {wanted}")
    return problems


def check_token_files(documents: list[Document]) -> list[str]:
    """Who looks at tokens may read the issuer's keys."""
    if "EVENTS_OIDC_AUDIENCE" not in data_of(find(documents, SETTINGS)):
        return []
    problems = []
    for name, template, container in ours(documents):
        if "command" in container:
            continue
        projected = {
            volume["name"]
            for volume in template["spec"]["volumes"]
            if "projected" in volume
        }
        mounts = {
            mount["mountPath"]
            for mount in container["volumeMounts"]
            if mount["name"] in projected
        }
        env = {each["name"]: each.get("value", "") for each in container["env"]}
        problems += [
            f"{name}: {variable} is not mounted"
            for variable in ("EVENTS_OIDC_KEYS_TOKEN_FILE", "EVENTS_OIDC_CA_FILE")
            if env.get(variable, "").rpartition("/")[0] not in mounts
        ]
    return problems
