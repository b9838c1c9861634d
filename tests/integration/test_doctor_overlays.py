"""`topup doctor` finds nothing wrong with what `kubectl apply -k` would take."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner

from function.cli import main

ROOT: Final = Path(__file__).parents[2]
#: Overlay -> what is applied beside it, and what the doctor warns of on purpose.
OVERLAYS: Final = {
    "laptop": ("keda/source", "manifests/kafka-laptop", {"1 copies"}),
    "production": ("keda/source", "manifests/kafka", set[str]()),
    "production-mtls": ("keda/source-mtls", "manifests/kafka-mtls", set[str]()),
    "production-oidc": ("keda/source", "manifests/kafka", set[str]()),
    "deployment": ("keda/deployment", "manifests/kafka", set[str]()),
}


def rendered(folder: str) -> str:
    command = ["kubectl", "kustomize", str(ROOT / folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_doctor_finds_nothing_wrong_with_the_overlay(overlay: str) -> None:
    keda, kafka, warned = OVERLAYS[overlay]
    folders = (
        f"manifests/overlays/{overlay}",
        keda,
        kafka,
        "manifests/secrets.example",
    )
    text = "\n---\n".join(map(rendered, folders))

    result = CliRunner().invoke(
        main, ["doctor", "--offline", "-", "--json"], input=text
    )

    found = json.loads(result.stdout)["diagnoses"]
    bad = [each for each in found if each["severity"] not in {"ok", "skipped"}]
    assert {each["severity"] for each in bad} <= {"warning"}
    assert all(any(word in each["message"] for word in warned) for each in bad), bad
    assert len(found) - len(bad) >= 20
    assert result.exit_code == 0


def test_every_overlay_is_looked_at() -> None:
    folders = {path.name for path in (ROOT / "manifests/overlays").iterdir()}
    assert folders == set(OVERLAYS)
