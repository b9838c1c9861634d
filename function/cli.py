"""The `topup` command: what operators and the migration Job run.

Owns the words of the command line; must never change an order by a way of its own.
"""

import sys

import click

from function.config import Settings
from function.database import make_engine
from function.errors import TopupError
from function.migrate import migrate as run_migrations


@click.group()
@click.version_option(package_name="topup-function")
def main() -> None:
    """Operate the top-up function."""


@main.command()
def migrate() -> None:
    """Bring the ledger's schema up to date; safe to run twice and at once."""
    try:
        engine = make_engine(Settings.from_env())
        revision = run_migrations(engine)
    except TopupError as error:
        click.echo(f"topup: {error}", err=True)
        sys.exit(1)
    click.echo(f"ledger at revision {revision}")


if __name__ == "__main__":
    main()
