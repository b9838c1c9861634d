"""The manifests agree among themselves and with the code; each check can fail.

Whatever is applied together is checked together, as kubectl renders it. A check that
can't fail would be worth nothing, so each is shown a copy with one thing broken.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from function.cli import main
from function.config import Settings
from function.events import read_topup
from tests.repo import (
    manifest_kafka_checks,
    manifest_network_checks,
    manifest_pod_checks,
)
from tests.repo.manifest_reading import ours
from tests.repo.rendered import (
    FOLDERS,
    INSTALLATIONS,
    ROOT,
    Document,
    field,
    find,
    installation,
    put,
    render,
)

CHECKS: Final[dict[str, Callable[[list[Document]], list[str]]]] = {
    name.removeprefix("check_"): check
    for module in (
        manifest_kafka_checks,
        manifest_network_checks,
        manifest_pod_checks,
    )
    for name, check in vars(module).items()
    if name.startswith("check_")
}

#: (check, installation, document, path, value), of the file beside this one.
BROKEN: Final[list[tuple[str, str, str, str, Any]]] = [
    (check, *each)
    for check, copies in yaml.safe_load(
        Path(__file__).with_name("broken_manifests.yaml").read_text("utf-8")
    ).items()
    for each in copies
]


@pytest.mark.parametrize("name", INSTALLATIONS)
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_applied_together_agrees(check: str, name: str) -> None:
    assert CHECKS[check](installation(name)) == []


@pytest.mark.parametrize(("check", "name", "wanted", "path", "value"), BROKEN)
def test_broken_copy_is_noticed(
    check: str, name: str, wanted: str, path: str, value: Any
) -> None:
    documents = installation(name)
    document = find(documents, wanted)
    assert document is not None, f"{wanted} is not there to be broken"
    if path:
        put(document, path, value)
    else:
        documents.remove(document)

    assert CHECKS[check](documents) != []


def test_second_scaler_is_noticed() -> None:
    documents = installation("production")
    documents += [
        each for each in installation("deployment") if "Scaled" in each["kind"]
    ]

    assert "two scalers watch one lag" in CHECKS["one_scaler"](documents)


def test_every_check_is_shown_to_fail() -> None:
    assert set(CHECKS) == {check for check, *_ in BROKEN}


def test_every_folder_is_part_of_something_that_is_checked() -> None:
    named = {folder for folders in INSTALLATIONS.values() for folder in folders}
    made_of = {"manifests/base", "keda/scram", "keda/source"}

    assert set(FOLDERS) == named | made_of


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_every_command_exists(name: str) -> None:
    for workload, _, container in ours(installation(name)):
        program, *words = container.get("command", ["topup"])
        options = [word for word in words if word.startswith("--")]
        said = CliRunner().invoke(
            main, [*(word for word in words if word.isalpha()), "--help"]
        )

        assert program == "topup", workload
        assert said.exit_code == 0, said.output
        assert [option for option in options if option not in said.output] == []


def test_deployment_runs_the_function_as_knative_does() -> None:
    """Written twice, because Knative has a kind of its own; the same nevertheless."""
    knative, deployment = (
        next(box for name, _, box in ours(installation(kind)) if wanted == name)
        for kind, wanted in (
            ("production", "KnativeService/topup-function"),
            ("deployment", "Deployment/topup-function"),
        )
    )

    for part in ("image", "env", "envFrom", "resources", "volumeMounts"):
        assert knative[part] == deployment[part]


def test_components_combine_without_serving(tmp_path: Path) -> None:
    """Tokens and certificates for the Deployment as well: one overlay names both."""
    copy = tmp_path / "manifests"
    shutil.copytree(ROOT / "manifests", copy)
    overlay = copy / "overlays" / "both"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "resources: [../deployment]\n"
        "components: [../../components/oidc, ../../components/mtls]\n"
    )
    documents = render(str(overlay))

    assert CHECKS["tokens"](documents) == []
    assert CHECKS["token_files"](documents) == []
    source = find(documents, "KafkaSource/topup-source")
    assert field(source, "spec.net.sasl") is None
    assert field(source, "spec.sink.audience") == "topup-function"


def test_probes_are_answered_by_the_function() -> None:
    answers = (ROOT / "function" / "main.py").read_text("utf-8")

    assert '"/healthz"' in answers
    assert '"/readyz"' in answers


def test_base_is_not_applied_by_itself() -> None:
    # Where the recharge API is, the overlay says.
    assert CHECKS["environment"](render("manifests/base")) != []


GUIDES: Final = [ROOT / name / "README.md" for name in ("manifests", "keda", "certs")]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_guide_applies_folders_and_files_that_are_there(guide: Path) -> None:
    text = guide.read_text("utf-8")
    folders = set(re.findall(r"kubectl apply -k ([\w./-]+)", text))

    assert folders
    assert folders <= set(FOLDERS)
    for file in re.findall(r"kubectl apply -f ([\w./-]+)", text):
        assert (ROOT / file).is_file()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (guide.parent / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_commands_of_a_guide_can_be_read_by_a_shell(guide: Path) -> None:
    text = guide.read_text("utf-8")
    for script in re.findall(
        r"^ *```bash\n(.+?)^ *```", text, re.MULTILINE | re.DOTALL
    ):
        done = subprocess.run(
            ["bash", "-n"], input=script, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"


def test_guide_makes_every_secret_with_its_keys() -> None:
    """The commands of the README make what the examples say, and nothing else."""
    text = GUIDES[0].read_text("utf-8").replace("\\\n", " ")
    made: dict[str, set[str]] = {}
    for name, options in re.findall(
        r'^ *secret "?([\w$-]+)"? (.+)$', text, re.MULTILINE
    ):
        keys = set(re.findall(r"--from-(?:literal|file)=([\w.]+)=", options))
        for role in ("migrate", "function", "resolver", "purge"):
            made.setdefault(name.replace("$role", role), keys)

    assert made == {
        each["metadata"]["name"]: set(each["stringData"])
        for each in render("manifests/secrets.example")
    }


def test_code_of_the_sandbox_is_all_that_it_imports() -> None:
    """It runs from a ConfigMap: what it imports must be in it."""
    text = GUIDES[0].read_text("utf-8")
    given = set(re.findall(r"--from-file=(demo/\w+\.py)", text))
    needed = {"demo/__init__.py", "demo/recharge_api.py"}
    for name in given:
        needed |= {
            f"demo/{module}.py"
            for module in re.findall(
                r"^from demo\.(\w+) import", (ROOT / name).read_text(), re.MULTILINE
            )
        }

    assert given == needed


def test_first_order_is_an_order() -> None:
    document = find(installation("laptop"), "ConfigMap/topup-first-order")
    assert document is not None
    key, _, value = document["data"]["orders.txt"].strip().partition("|")
    headers = {
        "ce-specversion": "1.0",
        "ce-id": "partition:0/offset:0",
        "ce-source": "/apis/v1/namespaces/topup/kafkasources/topup-source#requests",
        "ce-type": "dev.knative.kafka.event",
        "ce-key": key,
    }

    order = read_topup(headers, value.encode(), Settings.event_type)

    assert order.msisdn == key
