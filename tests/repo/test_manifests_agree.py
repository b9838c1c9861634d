"""The manifests agree among themselves and with the code; each check can fail.

Whatever is applied together is checked together, as kubectl renders it. A check that
can't fail would be worth nothing, so each is shown a copy with one thing broken.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from function.cli import main
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


def test_probes_are_answered_by_the_function() -> None:
    answers = (ROOT / "function" / "main.py").read_text("utf-8")

    assert '"/healthz"' in answers
    assert '"/readyz"' in answers


def test_base_is_not_applied_by_itself() -> None:
    # Where the recharge API is, the overlay says.
    assert CHECKS["environment"](render("manifests/base")) != []
