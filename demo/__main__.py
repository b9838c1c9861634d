"""`python -m demo`: the whole story on one machine.

Owns the command line and its exit status: 0 green, 1 red, 2 something is missing or
broken, 130 interrupted. Must never leave a process behind.
"""

import signal
import sys

import click
from confluent_kafka import KafkaException

from demo.processes import PartFailed
from demo.server_process import ServerError, ServiceMissing
from demo.story import Services, play

_BROKEN = 2
_INTERRUPTED = 130


@click.command()
@click.option(
    "--naive",
    is_flag=True,
    envvar="NAIVE",
    help="Play it with the article's own design, which ends red.",
)
@click.option(
    "--services",
    type=click.Choice(["embedded", "real"]),
    default="embedded",
    envvar="SERVICES",
    help="Everything in one process and a file, or Apache Kafka and MariaDB.",
)
def main(*, naive: bool, services: Services) -> None:
    """Tell the story of a top-up, with real processes that really die."""
    # As Ctrl-C: every part is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = play(services=services, is_naive=naive)
    except (PartFailed, ServerError, ServiceMissing, KafkaException) as error:
        click.echo(f"demo: {error}", err=True)
        status = _BROKEN
    except KeyboardInterrupt:
        click.echo("demo: interrupted; every process is stopped", err=True)
        status = _INTERRUPTED
    sys.exit(status)


if __name__ == "__main__":
    main()
