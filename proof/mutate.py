"""`make mutants`: break the guards on purpose, one at a time, and see who notices.

Owns the copies that are broken and the runs over them; must never change this tree.

Each file of proof/mutants/ is one breakage: exact old texts and what replaces them, and
which instruments ought to see it, the cheapest first. An old text that is not found
exactly once fails loudly: the code has moved on, and the breakage with it.

    copy -> check that the unbroken copy is green -> break -> run -> restore -> next

Exit status: 0 each was caught, 1 one survived, 2 a breakage or an instrument is broken.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from demo.server_process import ProcessGroup

ROOT: Final = Path(__file__).parents[1]
MUTANTS: Final = ROOT / "proof" / "mutants"
BUILD: Final = ROOT / "build" / "mutants"
#: Whoever takes longer has been made to hang by the breakage, which is being seen.
TIMEOUT_S: Final = 900.0

#: Instrument -> its command, in the form that is quick enough to be run often. `tests`
#: takes what the breakage names.
INSTRUMENTS: Final[dict[str, tuple[str, ...]]] = {
    "simulate": ("-m", "proof.simulate", "--runs", "4000", "--seed", "1"),
    "fuzz": ("-m", "proof.fuzz", "--short"),
    "hostile": ("-m", "proof.hostile", "--short", "--seed", "1"),
    "tests": ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
    "crash": ("-m", "proof.crash_matrix", "--short", "--first"),
    "soak": ("-m", "proof.soak", "--minutes", "1", "--seed", "1"),
}
#: What a run says by its exit status: that it found something, as pytest does, too.
GREEN: Final = 0
RED: Final = 1


class BrokenMutant(Exception):
    """A breakage can't be applied, or an instrument doesn't work without it."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One replacement in one file."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        """Replace the old text.

        Raises:
            BrokenMutant: it is not there exactly once.

        """
        path = tree / self.file
        text = path.read_text("utf-8")
        found = text.count(self.old)
        if found != 1:
            raise BrokenMutant(
                f"{self.file}: the old text is there {found} times, not once: "
                f"{self.old.strip().splitlines()[0]!r}"
            )
        path.write_text(text.replace(self.old, self.new), "utf-8")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A guard that is taken away."""

    name: str
    #: What goes wrong without it, in one line.
    breaks: str
    #: Which instruments ought to see it, the cheapest first.
    instruments: tuple[str, ...]
    #: What `tests` runs: paths, and what else pytest is to be told.
    tests: tuple[str, ...]
    edits: tuple[Edit, ...]


@dataclass(slots=True)
class Result:
    """What became of a breakage."""

    name: str
    breaks: str
    caught_by: str | None = None
    seconds: float = 0.0
    #: Instruments that stayed green.
    missed_by: list[str] = field(default_factory=list)


def read_mutant(path: Path) -> Mutant:
    """Read one file of proof/mutants/.

    Raises:
        BrokenMutant: a part is missing or names what doesn't exist.

    """
    document = tomllib.loads(path.read_text("utf-8"))
    try:
        mutant = Mutant(
            path.stem,
            document["breaks"],
            tuple(document["instruments"]),
            tuple(document.get("tests", ())),
            tuple(Edit(**edit) for edit in document["edit"]),
        )
    except (KeyError, TypeError) as error:
        raise BrokenMutant(f"{path.name}: {error!r}") from None
    unknown = set(mutant.instruments) - set(INSTRUMENTS)
    if unknown or not mutant.instruments:
        raise BrokenMutant(f"{path.name}: no instrument {', '.join(sorted(unknown))}")
    if ("tests" in mutant.instruments) != bool(mutant.tests):
        raise BrokenMutant(
            f"{path.name}: `tests` the instrument and the list go together"
        )
    return mutant


def all_mutants() -> list[Mutant]:
    """Every breakage that is kept, by name."""
    return [read_mutant(path) for path in sorted(MUTANTS.glob("*.toml"))]


def copy_tree(target: Path) -> None:
    """Copy what git knows of this tree, as it stands."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    # What was fetched for the servers; the copies need not fetch it again.
    (target / "build").mkdir(exist_ok=True)
    for libs in (ROOT / "build").glob("kafka-libs-*"):
        (target / "build" / libs.name).symlink_to(libs)


@contextmanager
def broken(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Apply a breakage to the copy, and take it back.

    Raises:
        BrokenMutant: an old text is not there exactly once; nothing is changed.

    """
    before = {edit.file: (tree / edit.file).read_bytes() for edit in mutant.edits}
    try:
        for edit in mutant.edits:
            edit.apply(tree)
        yield
    finally:
        for name, content in before.items():
            (tree / name).write_bytes(content)


def command_of(instrument: str, mutant: Mutant) -> tuple[str, ...]:
    """What is run, without the interpreter."""
    return (*INSTRUMENTS[instrument], *(mutant.tests if instrument == "tests" else ()))


def run(command: Sequence[str], tree: Path, log: Path) -> int:
    """Run an instrument in a copy; returns its exit status, RED for a hang.

    Whatever it started is killed with it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    given = [f"{name}={value}" for name, value in env.items()]
    group = ProcessGroup(
        ["env", "-i", *given, sys.executable, *command], log=log, cwd=tree
    )
    try:
        return group.process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return RED
    finally:
        group.kill()


def require_green(mutants: Iterable[Mutant], tree: Path) -> None:
    """See that no instrument is red before anything is broken.

    Raises:
        BrokenMutant: one is; what it would say of a breakage means nothing.

    """
    commands = {
        command_of(name, mutant): name
        for mutant in mutants
        for name in mutant.instruments
    }
    for number, (command, name) in enumerate(sorted(commands.items())):
        log = BUILD / f"unbroken-{number}-{name}.log"
        status = run(command, tree, log)
        if status != GREEN:
            raise BrokenMutant(
                f"{name} ends with {status} although nothing is broken: "
                f"{log.relative_to(ROOT)}"
            )


def try_mutant(mutant: Mutant, tree: Path, *, is_thorough: bool) -> Result:
    """Break one guard, and run the instruments until one sees it.

    Args:
        mutant: the breakage.
        tree: the copy.
        is_thorough: run all of its instruments, also after the first that is red.

    Raises:
        BrokenMutant: it can't be applied, or an instrument ends otherwise than by a
            verdict.

    """
    result = Result(mutant.name, mutant.breaks)
    started = time.monotonic()
    with broken(mutant, tree):
        for name in mutant.instruments:
            log = BUILD / f"{mutant.name}-{name}.log"
            status = run(command_of(name, mutant), tree, log)
            if status == GREEN:
                result.missed_by.append(name)
                continue
            if status != RED:
                raise BrokenMutant(
                    f"{mutant.name}: {name} ends with {status}, which is no verdict: "
                    f"{log.relative_to(ROOT)}"
                )
            result.caught_by = result.caught_by or name
            if not is_thorough:
                break
    result.seconds = round(time.monotonic() - started, 1)
    return result


def tell(results: Sequence[Result], console: Console) -> None:
    """Print who caught what."""
    table = Table(box=None, pad_edge=False)
    for title in ("breakage", "what breaks", "caught by", "s"):
        table.add_column(title, justify="right" if title == "s" else "left")
    for each in results:
        caught = each.caught_by or "[bold red]nobody[/]"
        table.add_row(each.name, each.breaks, caught, f"{each.seconds:.0f}")
    console.print(table)


@click.command()
@click.option("--only", multiple=True, help="A breakage's name; repeatable.")
@click.option("--instrument", multiple=True, type=click.Choice(list(INSTRUMENTS)))
@click.option("--thorough", is_flag=True, help="Run every instrument of each.")
def main(*, only: tuple[str, ...], instrument: tuple[str, ...], thorough: bool) -> None:
    """Break each guard in a copy, and require that an instrument sees it."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        results = _all_results(only, instrument, console, is_thorough=thorough)
    except BrokenMutant as error:
        click.echo(f"mutants: {error}", err=True)
        sys.exit(2)
    BUILD.mkdir(parents=True, exist_ok=True)
    report = BUILD / "report.json"
    report.write_text(json.dumps([asdict(each) for each in results], indent=2))
    tell(results, console)
    survivors = [each.name for each in results if each.caught_by is None]
    if survivors:
        console.print(f"\n[bold red]RED[/]: nobody sees {', '.join(survivors)}.")
        sys.exit(1)
    console.print(f"\n[bold green]GREEN[/]: each of {len(results)} breakages was seen.")


def _all_results(
    only: tuple[str, ...],
    instruments: tuple[str, ...],
    console: Console,
    *,
    is_thorough: bool,
) -> list[Result]:
    mutants = [each for each in all_mutants() if not only or each.name in only]
    if instruments:
        mutants = [
            Mutant(
                each.name,
                each.breaks,
                tuple(name for name in each.instruments if name in instruments),
                each.tests if "tests" in instruments else (),
                each.edits,
            )
            for each in mutants
            if set(each.instruments) & set(instruments)
        ]
    if not mutants:
        raise BrokenMutant("no breakage has that name")
    tree = BUILD / "tree"
    copy_tree(tree)
    # All of them first: one that the code has outgrown shouldn't wait for its turn.
    for mutant in mutants:
        with broken(mutant, tree):
            pass
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("unbroken", total=len(mutants))
            require_green(mutants, tree)
            results = []
            for mutant in mutants:
                progress.update(task, description=mutant.name)
                results.append(try_mutant(mutant, tree, is_thorough=is_thorough))
                progress.advance(task)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return results


if __name__ == "__main__":
    main()
