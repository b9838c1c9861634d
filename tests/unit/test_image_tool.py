"""`make image` finds the tool that works, and says what to do where none does."""

import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from demo import image
from demo.server_process import ServiceMissing

NEEDS_NOTHING = "#!/bin/sh\n"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder on PATH; and no wheels of a build that runs beside us go."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(image, "_WHEELS", tmp_path / "wheels")
    return tmp_path


def install(programs: Path, name: str, script: str) -> None:
    (programs / name).write_text(NEEDS_NOTHING + script)
    (programs / name).chmod(0o755)


def test_client_without_its_daemon_is_passed_over(programs: Path) -> None:
    install(programs, "docker", 'test "$1" != info')
    install(programs, "podman", "exit 0")

    assert image.find_tool() == "podman"


def test_docker_that_works_comes_first(programs: Path) -> None:
    for name in image.TOOLS:
        install(programs, name, "exit 0")

    assert image.find_tool() == "docker"


def test_machine_without_a_tool_is_told_what_to_install(programs: Path) -> None:
    install(programs, "docker", "exit 1")

    with pytest.raises(ServiceMissing, match="install podman"):
        image.find_tool()


def test_base_that_cant_be_pulled_fails_in_one_line_with_the_way_out(
    programs: Path,
) -> None:
    install(programs, "podman", 'test "$1" = info')

    told = CliRunner().invoke(image.main, [])

    assert told.exit_code == 1
    assert "make image BASE=local" in str(told.output)


def test_tool_is_given_the_named_base_and_the_projects_version(programs: Path) -> None:
    given = programs / "given"
    install(programs, "podman", f'echo "$@" >{shlex.quote(str(given))}')

    options = ["--base", "python@sha256:1", "--tag", "shop/topup:7"]
    told = CliRunner().invoke(image.main, options)

    assert told.exit_code == 0, told.output
    words = given.read_text().split()
    assert words[:3] == ["build", "--tag", "shop/topup:7"]
    assert "--build-arg=PYTHON_IMAGE=python@sha256:1" in words
    assert "--build-arg=VERSION=0.1.0" in words


@pytest.mark.usefixtures("programs")
def test_local_base_needs_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of another Python would not fit: better said before the build."""
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))

    told = CliRunner().invoke(image.main, ["--base", "local", "--tool", "podman"])

    assert told.exit_code == 1
    assert "Python 3.11" in told.output
