"""The function's container image, built with docker, podman or buildah.

Owns `make image`: which tool builds, and a base of our own making for a machine where
none can be pulled (`--base local`). Must never push an image, or run one.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from demo.server_process import PROJECT, ServiceMissing

#: The name of an image, or this: made here, from Debian's packages.
LOCAL: Final = "local"
#: Tool -> its words for "build", the most usual first.
TOOLS: Final[Mapping[str, Sequence[str]]] = {
    "docker": ("build",),
    "podman": ("build",),
    "buildah": ("build", "--layers"),
}
LOCAL_BASE: Final = "localhost/topup-python:3.11-bookworm"
#: Debian bookworm's Python: what the wheels for a local base must suit.
LOCAL_PYTHON: Final = (3, 11)
_SUITE: Final = "bookworm"
#: What the slim image of Python has, too: nothing but Python and the usual CAs.
_PACKAGES: Final = "python3,python3-venv,ca-certificates"
_WHEELS: Final = PROJECT / "build" / "wheels"
_BASE: Final = PROJECT / "build" / "image" / "base"


class BuildFailed(Exception):
    """A step of the build failed; says which, after that step's own words."""


def find_tool() -> str:
    """The first tool that is installed and works; ServiceMissing without one.

    A client whose daemon doesn't run is no tool.
    """
    for tool in TOOLS:
        if shutil.which(tool) is None:
            continue
        asked = subprocess.run([tool, "info"], capture_output=True, check=False)
        if asked.returncode == 0:
            return tool
    raise ServiceMissing(
        "none of docker, podman and buildah works here: install podman "
        "(`python -m demo.services install` does it on Debian)"
    )


def build_image(tag: str, *, tool: str, base: str = "") -> None:
    """Build the image and name it `tag`.

    Args:
        tag: the image's name and version.
        tool: one of TOOLS.
        base: an image with Python 3.11; `local`: one that is made here, and the wheels
            are fetched outside the build, which then needs no network; empty: what
            the Dockerfile says.

    Raises:
        BuildFailed: a step failed.
        ServiceMissing: a program that it takes is not installed.

    """
    arguments = {"VERSION": _version(), "REVISION": _revision()}
    # Wheels of another time could be other versions than those of the lock.
    shutil.rmtree(_WHEELS, ignore_errors=True)
    try:
        if base == LOCAL:
            _fetch_wheels()
            _make_local_base(tool)
        if base:
            arguments["PYTHON_IMAGE"] = LOCAL_BASE if base == LOCAL else base
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        is_local = base == LOCAL
        _build(tool, PROJECT, tag, given, is_local=is_local)
    finally:
        shutil.rmtree(_WHEELS, ignore_errors=True)


def _make_local_base(tool: str) -> None:
    """Debian with its Python, from the packages that this machine can install."""
    if shutil.which("mmdebstrap") is None:
        raise ServiceMissing(
            "a local base takes mmdebstrap: `python -m demo.services install` installs "
            "it on Debian; elsewhere name an image: make image BASE=..."
        )
    root = _BASE / "root.tar"
    if not root.exists():
        _BASE.mkdir(parents=True, exist_ok=True)
        part = _BASE / "part.tar"
        _run(
            "mmdebstrap",
            *("--quiet", "--variant=essential", f"--include={_PACKAGES}"),
            "--dpkgopt=path-exclude=/usr/share/{doc,man,locale}/*",
            *(_SUITE, part),
        )
        part.rename(root)
    (_BASE / "Dockerfile").write_text(f"FROM scratch\nADD {root.name} /\n", "utf-8")
    _build(tool, _BASE, LOCAL_BASE, [], is_local=True)


def _fetch_wheels() -> None:
    """The wheels of the lock, where the Dockerfile looks for them."""
    if sys.version_info[:2] != LOCAL_PYTHON or sys.platform != "linux":
        raise BuildFailed(
            "the wheels for a local base are fetched with the base's own Python: run "
            "this on Linux with Python " + ".".join(map(str, LOCAL_PYTHON))
        )
    _run(
        *(sys.executable, "-m", "pip", "download", "--quiet"),
        *("--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"),
        *("--requirement", PROJECT / "requirements.lock", "--dest", _WHEELS),
    )


def _build(
    tool: str, context: Path, tag: str, options: Sequence[str], *, is_local: bool
) -> None:
    env = dict(os.environ)
    if is_local:
        # Where nothing can be pulled, containers can seldom be nested either; the steps
        # are our own, and trusted. Docker doesn't know this variable.
        env.setdefault("BUILDAH_ISOLATION", "chroot")
    _run(tool, *TOOLS[tool], "--tag", tag, *options, context, env=env)


def _run(*command: str | Path, env: Mapping[str, str] | None = None) -> None:
    if subprocess.run(command, env=env, check=False).returncode:
        raise BuildFailed(f"{Path(command[0]).name} failed; its words are above")


def _version() -> str:
    with (PROJECT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def _revision() -> str:
    """The commit, `-dirty` where more than it is built; empty outside of git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    asked = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


@click.command()
@click.option("--tag", default="", help="Name; topup-function and the version.")
@click.option("--base", default="", help=f"Image with Python 3.11, or `{LOCAL}`.")
@click.option("--tool", type=click.Choice([*TOOLS]), help="Else the first that works.")
def main(tag: str, base: str, tool: str | None) -> None:
    """Build the function's image."""
    try:
        tag = tag or f"topup-function:{_version()}"
        build_image(tag, tool=tool or find_tool(), base=base)
    except (BuildFailed, ServiceMissing) as error:
        hint = "" if base else f" (no image can be pulled? make image BASE={LOCAL})"
        raise SystemExit(f"image: {error}{hint}") from None
    click.echo(f"image: {tag}")


if __name__ == "__main__":
    main()
