"""Tells and installs what the demo and the tests need beside Python.

Owns the command line `python -m demo.services install|check`; must never make or start
a service of the machine. The servers themselves: mariadb.py, kafka_broker.py.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import click

from demo.kafka_broker import (
    OR_NAME_A_BROKER,
    fetch_kafka,
    find_java,
    kafka_from_environment,
    kafka_libs,
    kafka_version,
)
from demo.mariadb import find_mariadb, mariadb_from_environment
from demo.server_process import ServiceMissing

#: What the tests build the image with and run it, by programs that are their packages.
_IMAGE_PROGRAMS: Final = ("podman", "runc", "mmdebstrap")


def mariadb_status(env: Mapping[str, str]) -> str:
    """Which MariaDB would be used; ServiceMissing where there is none."""
    if mariadb_from_environment(env) is not None:
        return "the server that LEDGER_DATABASE_URL names"
    return str(find_mariadb()[0])


def kafka_status(env: Mapping[str, str]) -> str:
    """Which Kafka would be used; ServiceMissing where there is none."""
    if kafka_from_environment(env) is not None:
        return "the broker that KAFKA_BOOTSTRAP_SERVERS names"
    java, libs = find_java(), kafka_libs()
    if libs is None:
        raise ServiceMissing(
            "the Kafka jars are not fetched: `python -m demo.services install` does "
            f"it with Maven, {OR_NAME_A_BROKER}"
        )
    return f"{kafka_version()} in {libs}, with {java}"


def require_image_programs() -> None:
    """Do nothing where the image can be built and run; else ServiceMissing says why."""
    missing = [name for name in _IMAGE_PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ServiceMissing(
            f"{', '.join(missing)} missing: `python -m demo.services install` installs "
            "what builds and runs the image on Debian"
        )


def image_status(_env: Mapping[str, str]) -> str:
    """What would build and run the image; ServiceMissing where a part is missing."""
    require_image_programs()
    return ", ".join(str(shutil.which(name)) for name in _IMAGE_PROGRAMS)


_STATUSES: Final[Mapping[str, Callable[[Mapping[str, str]], str]]] = {
    "MariaDB": mariadb_status,
    "Kafka": kafka_status,
    "Image": image_status,
}


@click.group()
def main() -> None:
    """Tell or install what the demo and the tests need beside Python."""


@main.command()
def check() -> None:
    """Tell which servers are there; exit with 1 if CI is set and one is missing."""
    _report(os.environ)


@main.command()
def install() -> None:
    """Install what is missing: programs (Debian, as root) and the jars of Kafka.

    Programs only: no service of the machine is made or started. What can't be
    installed is told, and is a failure only where CI is set.
    """
    packages = _missing_packages(os.environ)
    if packages and shutil.which("apt-get") and os.geteuid() == 0:
        _apt_install(packages)
    elif packages:
        click.echo(f"skipped, for it takes Debian and root: {', '.join(packages)}")
    if not os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        try:
            fetch_kafka()
        except ServiceMissing as missing:
            click.echo(f"skipped: {missing}")
    _report(os.environ)


def _report(env: Mapping[str, str]) -> None:
    """One line a server; ends the program with 1 if CI is set and one is missing."""
    is_missing = False
    for name, status in _STATUSES.items():
        try:
            click.echo(f"{name}: {status(env)}")
        except ServiceMissing as missing:
            click.echo(f"{name}: {missing}")
            is_missing = True
    if is_missing and env.get("CI"):
        raise SystemExit(1)


def _missing_packages(env: Mapping[str, str]) -> list[str]:
    """Debian's packages that would bring what is missing and not given."""
    packages = []
    if not env.get("LEDGER_DATABASE_URL") and _is_missing(find_mariadb):
        packages += ["mariadb-server-core", "mariadb-client-core"]
    if not env.get("KAFKA_BOOTSTRAP_SERVERS"):
        if _is_missing(find_java):
            packages.append("default-jre-headless")
        if kafka_libs() is None and shutil.which("mvn") is None:
            packages.append("maven")
    packages += [name for name in _IMAGE_PROGRAMS if shutil.which(name) is None]
    return packages


def _is_missing(find: Callable[[], object]) -> bool:
    try:
        find()
    except ServiceMissing:
        return True
    return False


def _apt_install(packages: Sequence[str]) -> None:
    """Install Debian packages; what fails shows in the report that follows."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    # The list of packages is fetched only when the one that is there is too old.
    if subprocess.run(command, env=env, check=False).returncode:
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=False)
        subprocess.run(command, env=env, check=False)


if __name__ == "__main__":
    main()
