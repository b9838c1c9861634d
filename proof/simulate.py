"""`make simulate`: look for a schedule that breaks a guarantee.

Owns the command, its progress and its verdict; must never decide what a guarantee is.

    python -m proof.simulate                       200,000 seeds, the smallest setups
    python -m proof.simulate --runs 5000 --seed 1  only seeds
    python -m proof.simulate --exhaustive          only the small setups, all of them
    python -m proof.simulate --replay NAME         one run again, with its trace

Exit status: 0 nothing found, 1 a guarantee is broken, 2 a wrong option.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from function.model import TRANSITIONS
from proof.explore import (
    Found,
    Tally,
    again,
    exhaust,
    first_deviations,
    search,
    shrink,
)
from proof.setups import KINDS, small_setups

REPORT: Final = Path("build/simulate/report.json")
_RUNS: Final = 200_000
_RUNS_A_JOB: Final = 500
_FIRSTS_A_JOB: Final = 8
#: More processes than cores would only wait for each other.
_PROCESSES_MAX: Final = 8
_TRACE_LINES_MAX: Final = 400

#: Its name, what it will be, and how many runs that is, if that is known.
Job = tuple[str, Callable[[], Tally], int]


@dataclass(frozen=True, slots=True)
class Result:
    """What a whole search brought."""

    tallies: dict[str, Tally]
    found: Found | None
    seconds: float

    @property
    def total(self) -> Tally:
        """Everything together."""
        total = Tally()
        for tally in self.tallies.values():
            total.merge(tally)
        return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _options(arguments)
    console = Console()
    if options.replay:
        return _replay(options.replay, console)
    is_both = options.runs is None and not options.exhaustive
    jobs: list[Job] = []
    if options.exhaustive or is_both:
        jobs += _exhaustive_jobs(options.kind, is_whole=options.exhaustive)
    if options.runs is not None or is_both:
        jobs += _seeded_jobs(options.seed, options.runs or _RUNS, options.kind)
    started = time.monotonic()
    tallies, found = _work(jobs, options.processes, console)
    result = Result(tallies, found, time.monotonic() - started)
    return _tell(result, options, console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m proof.simulate",
        description="Look for a schedule that breaks a guarantee.",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--runs", type=int, help=f"how many seeds ({_RUNS:,} if nothing is said)"
    )
    parser.add_argument("--kind", choices=KINDS, help="of recharge API; all by default")
    parser.add_argument(
        "--exhaustive",
        action="store_true",
        help="every run of the small setups with two deviations or fewer",
    )
    parser.add_argument("--replay", metavar="NAME", help="play one run, with its trace")
    cores = min(_PROCESSES_MAX, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=cores)
    return parser.parse_args(arguments)


def _seeded_jobs(seed: int, runs: int, kind: str | None) -> Iterator[Job]:
    for start in range(seed, seed + runs, _RUNS_A_JOB):
        size = min(_RUNS_A_JOB, seed + runs - start)
        yield "seeds", partial(search, start, size, kind=kind), size


def _exhaustive_jobs(kind: str | None, *, is_whole: bool) -> Iterator[Job]:
    kinds = KINDS if kind is None else (kind,)
    for name, setup, deviations in small_setups(kinds, is_whole=is_whole):
        firsts = iter(first_deviations(setup))
        while chunk := [*islice(firsts, _FIRSTS_A_JOB)]:
            yield name, partial(exhaust, name, chunk, deviations), 0


def _work(
    jobs: Sequence[Job], processes: int, console: Console
) -> tuple[dict[str, Tally], Found | None]:
    """Do all jobs, in order, up to the first find."""
    tallies: dict[str, Tally] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("jobs, {task.fields[runs]:,} runs"),
        Elapsed(),
    )
    waiting = iter(jobs)
    running: dict[Future[Tally], tuple[int, str]] = {}
    finds: dict[int, Found] = {}
    number = runs = 0
    with (
        Progress(
            *columns, console=console, disable=not console.is_terminal
        ) as progress,
        ProcessPoolExecutor(processes) as pool,
    ):
        task = progress.add_task("simulate", total=len(jobs), runs=0)
        while True:
            # Nothing new after a find; what runs may yet find an earlier one.
            free = 0 if finds else 2 * processes - len(running)
            for name, job, _ in islice(waiting, free):
                running[pool.submit(job)] = (number, name)
                number += 1
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                place, name = running.pop(future)
                tally = future.result()
                runs += tally.runs
                tallies.setdefault(name, Tally()).merge(tally)
                if tally.found:
                    finds[place] = _placed(tally.found, place, name)
                progress.update(task, advance=1, runs=runs, description=name)
    return tallies, finds[min(finds)] if finds else None


def _placed(found: Found, place: int, name: str) -> Found:
    """Count the runs of the jobs before, where each has as many."""
    if name != "seeds":
        return found
    return replace(found, runs=found.runs + place * _RUNS_A_JOB)


def _tell(result: Result, options: argparse.Namespace, console: Console) -> int:
    total = result.total
    schedules = {
        name: tally.runs for name, tally in result.tallies.items() if name != "seeds"
    }
    seeded = result.tallies.get("seeds", Tally()).runs
    legal = {(one.value, to.value) for one, many in TRANSITIONS.items() for to in many}
    unseen = sorted(legal - total.transitions)
    smallest = shrink(result.found) if result.found else None
    trace = _trace(smallest.name) if smallest else []
    report = {
        "verdict": "red" if result.found else "green",
        "seed": options.seed,
        "kind": options.kind or "all",
        "seeded_runs": seeded,
        "schedules": schedules,
        "choice_points": total.points,
        "api_calls": total.calls,
        "seconds": round(result.seconds, 1),
        "processes": options.processes,
        "transitions_seen": sorted(" -> ".join(each) for each in total.transitions),
        "transitions_not_seen": [" -> ".join(each) for each in unseen],
        "what_happened": dict(total.counts.most_common()),
        "found": None,
    }
    if result.found and smallest:
        report["found"] = {
            "run": result.found.name,
            "violation": result.found.violation,
            "runs": result.found.runs,
            "smallest": smallest.name,
            "its_violation": smallest.violation,
            "trace": trace,
        }
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    rate = total.runs / max(result.seconds, 0.001)
    console.print(
        f"{sum(schedules.values()):,} schedules of {len(schedules)} small setups, "
        f"each one; {seeded:,} seeds; {total.points:,} choices; "
        f"{total.calls:,} calls of the API",
        f"{result.seconds:.1f} s, {rate:,.0f} runs/s; {len(legal) - len(unseen)} of "
        f"{len(legal)} legal transitions seen; everything in {REPORT}",
        sep="\n",
        highlight=False,
    )
    if result.found is None or smallest is None:
        console.print("\nGREEN: no schedule breaks a guarantee.", highlight=False)
        return 0
    console.print(*trace, sep="\n", markup=False, highlight=False)
    console.print(
        f"\nRED: {result.found.violation}",
        f"run {result.found.runs:,}; again: python -m proof.simulate "
        f"--replay {result.found.name}",
        f"the smallest that breaks alike, above: --replay {smallest.name}",
        sep="\n",
        markup=False,
        highlight=False,
    )
    return 1


def _trace(name: str) -> list[str]:
    world, violation = again(name)
    lines = world.scheduler.trace or []
    if len(lines) > _TRACE_LINES_MAX:
        half = _TRACE_LINES_MAX // 2
        lines = [*lines[:half], "           …", *lines[-half:]]
    return [*lines, f"            => {violation or 'nothing is broken'}"]


def _replay(name: str, console: Console) -> int:
    try:
        world, violation = again(name)
    except ValueError as error:
        console.print(str(error), markup=False, highlight=False)
        return 2
    trace = world.scheduler.trace or []
    console.print(world.setup, *trace, sep="\n", markup=False, highlight=False)
    said = f"RED: {violation}" if violation else "GREEN: nothing is broken in this run"
    console.print(f"\n{said}", markup=False, highlight=False)
    return 1 if violation else 0


if __name__ == "__main__":
    sys.exit(main())
