"""The manifests name settings and commands that exist."""

import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from function.cli import main
from function.config import Settings, settings_table

BASE: Final = Path(__file__).parents[2] / "manifests" / "base"


def resolver() -> dict[str, Any]:
    document = yaml.safe_load((BASE / "resolver-deployment.yaml").read_text("utf-8"))
    assert isinstance(document, dict)
    return document


def container() -> dict[str, Any]:
    found: dict[str, Any] = resolver()["spec"]["template"]["spec"]["containers"][0]
    return found


def test_resolver_is_given_settings_that_exist() -> None:
    known = {name for name, _, _ in settings_table()}

    assert {each["name"] for each in container()["env"]} <= known


def test_resolver_is_given_every_setting_without_a_default() -> None:
    required = {name for name, default, _ in settings_table() if default == "required"}

    assert required <= {each["name"] for each in container()["env"]}


def test_resolver_runs_a_command_that_exists() -> None:
    program, *words = container()["command"]

    assert program == "topup"
    assert CliRunner().invoke(main, [*words, "--help"]).exit_code == 0


def test_resolver_may_finish_a_call_before_it_is_killed() -> None:
    grace_s = resolver()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    defaults = {name: default for name, default, _ in settings_table()}

    assert Settings.__dataclass_fields__["ledger_lease_s"].default < grace_s
    assert float(defaults["RECHARGE_API_DEADLINE_S"]) < grace_s


def test_base_is_rendered_by_kustomize() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: install it to render the manifests")
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=True
    )

    kinds = [each["kind"] for each in yaml.safe_load_all(rendered.stdout)]
    assert kinds == ["Deployment"]
