"""`python -m proof.crash_matrix`: play the cells, show how far it is, say the verdict.

Owns the command line, the order in which cells run side by side, and the exit status: 0
green, 1 red, 2 something is missing or broken, 130 interrupted. It must never leave a
process behind, nor judge.
"""

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from demo.recharge_api import Kind
from demo.server_process import PROJECT, ServerError, ServiceMissing
from proof.crash_matrix.cells import (
    BOUNDARIES,
    Behaviour,
    Cell,
    all_cells,
    chosen,
    short_cells,
)
from proof.crash_matrix.ground import Rig, Server
from proof.crash_matrix.judging import bystander_findings, findings
from proof.crash_matrix.playing import play
from proof.crash_matrix.report import Figures, Result, markdown, write_json
from proof.crash_matrix.wires import Loop

_BROKEN: Final = 2
_INTERRUPTED: Final = 130
#: Cells wait most of their time, for a lease to end.
_AT_ONCE: Final = 14
_MARK: Final = ".crash-matrix"
_SHOWN_MAX: Final = 10


@click.command()
@click.option("--short", is_flag=True, help="Each boundary with each kind, once.")
@click.option(
    "--boundary",
    "boundaries",
    multiple=True,
    type=click.Choice([str(each) for each in BOUNDARIES]),
    help="Only this one; repeatable.",
)
@click.option(
    "--behaviour",
    "behaviours",
    multiple=True,
    type=click.Choice([each.value for each in Behaviour]),
    help="Only this one; repeatable.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([each.value for each in Kind]),
    help="Only this one; repeatable.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 64),
    default=_AT_ONCE,
    show_default=True,
    help="Cells that run side by side.",
)
@click.option("--first", is_flag=True, help="Stop at the first cell that is red.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=PROJECT / "build" / "crash",
    help="Gets report.json, and the traces of red cells.",
)
@click.option(
    "--page",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table there, too, as Markdown.",
)
def main(
    *,
    short: bool,
    boundaries: Sequence[str],
    behaviours: Sequence[str],
    kinds: Sequence[str],
    at_once: int,
    first: bool,
    directory: Path,
    page: Path | None,
) -> None:
    """Kill the function and the resolver at every boundary, and count executions."""
    # As Ctrl-C: every part is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cells = chosen(
        short_cells() if short else all_cells(),
        boundaries=boundaries,
        behaviours=behaviours,
        kinds=kinds,
    )
    if not cells:
        raise click.UsageError("the short form has no such cell: leave --short out")
    try:
        status = _run(cells, at_once, directory.absolute(), page, is_first=first)
    except (ServiceMissing, ServerError) as error:
        click.echo(f"crash matrix: {error}", err=True)
        status = _BROKEN
    except KeyboardInterrupt:
        click.echo("crash matrix: interrupted; every process is stopped", err=True)
        status = _INTERRUPTED
    sys.exit(status)


def _run(
    cells: Sequence[Cell],
    at_once: int,
    directory: Path,
    page: Path | None,
    *,
    is_first: bool,
) -> int:
    _empty(directory)
    began_s, today = time.monotonic(), datetime.now(UTC).date()
    # A socket's path must be short, and a project's folder need not be.
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, Loop() as loop:
        server = Server(Path(folder))
        with server.started() as version:
            rig = Rig(server, loop, directory / "cells")
            results = _play_all(cells, rig, at_once, is_first=is_first)
    facts = {
        "date": today.isoformat(),
        "MariaDB": version,
        "Python": sys.version.partition(" ")[0],
        "minutes": f"{(time.monotonic() - began_s) / 60:.1f}",
    }
    write_json(directory / "report.json", results, facts)
    if page is not None:
        page.write_text(markdown(results, facts), "utf-8")
    return _say(results, directory)


def _play_all(
    cells: Sequence[Cell], rig: Rig, at_once: int, *, is_first: bool
) -> list[Result]:
    """Play them side by side, as far as the first red one if that is enough.

    Returned in the order of `cells`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(highlight=False)
    results: dict[Cell, Result] = {}
    pool = ThreadPoolExecutor(at_once)
    try:
        with Progress(
            *columns, console=console, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("killing", total=len(cells))
            for done in as_completed([pool.submit(_play, cell, rig) for cell in cells]):
                result = done.result()
                results[result.cell] = result
                reds = sum(each.is_red for each in results.values())
                word = f"killing, {reds} red" if reds else "killing"
                bar.update(task, advance=1, description=word)
                if reds and is_first:
                    break
    finally:
        rig.stopping.set()
        pool.shutdown(cancel_futures=True)
    return [results[cell] for cell in cells if cell in results]


def _play(cell: Cell, rig: Rig) -> Result:
    """Play one; whatever goes wrong in it is its finding."""
    try:
        seen = play(cell, rig)
    except Exception as error:  # noqa: BLE001 -- a cell that breaks off is red.
        return Result(cell, None, [f"broke off: {type(error).__name__}: {error}"])
    found = [*findings(cell, seen), *bystander_findings(cell, seen)]
    if not found:
        shutil.rmtree(rig.directory / str(cell))
    return Result(cell, seen, found)


def _empty(directory: Path) -> None:
    """Make the folder empty, if it is ours."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / _MARK).exists():
            raise ServerError(f"{directory} is not empty, and not ours: remove it")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _MARK).touch()


def _say(results: Sequence[Result], directory: Path) -> int:
    """Tell the verdict; returns the exit status."""
    figures = Figures.of(results)
    reds = [result for result in results if result.is_red]
    for result in reds[:_SHOWN_MAX]:
        click.echo(f"{result.cell}: {'; '.join(result.findings)}")
    if len(reds) > _SHOWN_MAX:
        click.echo(f"... and {len(reds) - _SHOWN_MAX} more in the report")
    click.echo(
        f"{figures.cells} cells, {figures.kills} kills, {figures.unreachable} "
        f"boundaries that can't be reached and were not, {figures.executions} "
        f"executions, {figures.doubles} doubles, {figures.parked} parked."
    )
    shown = directory
    if directory.is_relative_to(PROJECT):
        shown = directory.relative_to(PROJECT)
    is_green = not reds
    verdict = (
        "GREEN: every order is executed once, or visibly not, and in order."
        if is_green
        else f"RED: {len(reds)} of {figures.cells} cells are not as promised."
    )
    click.secho(verdict, fg="green" if is_green else "red", bold=True)
    click.echo(f"Everything in {shown}/report.json")
    return 0 if is_green else 1


if __name__ == "__main__":
    main()
