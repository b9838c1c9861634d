"""Many runs: by seed, or every one with so many deviations; and one again.

Owns the search and the names of runs; must never judge: a Violation ends a run.

A run has a name from which it can be played again, exactly:

    replay:1041             kind and seed
    replay:1041:17.0-40.2   the same setup, and only these deviations
    none-line:12.3          a small setup and its deviations
"""

import gc
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from function.processing import Processing
from proof.chooser import (
    Chooser,
    Deviation,
    ListingChooser,
    ScriptedChooser,
    SeededChooser,
    draw_likelihoods,
)
from proof.judge import WatchedLedger
from proof.scheduler import Violation
from proof.setups import KINDS, draw_setup, small_setups
from proof.world import Setup, World

#: Greenlets and worlds are rings of references: collected now and then, not always.
_RUNS_A_COLLECTION: Final = 500


@dataclass(frozen=True, slots=True)
class Code:
    """What is under test; a test hands in broken copies."""

    make_processing: Callable[..., Processing] = Processing
    make_ledger: Callable[..., WatchedLedger] = WatchedLedger


@dataclass(frozen=True, slots=True)
class Found:
    """A run that broke a guarantee."""

    #: Plays it again.
    name: str
    violation: str
    #: Runs up to and with this one, in the order of the seeds.
    runs: int


@dataclass(slots=True)
class Tally:
    """What some runs were."""

    runs: int = 0
    #: Choice points passed.
    points: int = 0
    #: Calls of the simulated API.
    calls: int = 0
    transitions: set[tuple[str, str]] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    found: Found | None = None

    def add(self, world: World) -> None:
        """Count one run."""
        self.runs += 1
        self.points += world.points
        self.calls += sum(world.api.calls.values())
        self.transitions |= world.judge.transitions
        self.counts.update(world.counts)

    def merge(self, other: "Tally") -> None:
        """Count the runs of another; the first find is kept."""
        self.runs += other.runs
        self.points += other.points
        self.calls += other.calls
        self.transitions |= other.transitions
        self.counts.update(other.counts)
        self.found = self.found or other.found


def play(
    setup: Setup, chooser: Chooser, code: Code, *, is_traced: bool = False
) -> tuple[World, str | None]:
    """One run; what it broke, if anything."""
    world = World(
        setup,
        chooser,
        is_traced=is_traced,
        make_processing=code.make_processing,
        make_ledger=code.make_ledger,
    )
    try:
        world.run()
    except Violation as violation:
        return world, str(violation)
    return world, None


def seeded(seed: int, kind: str | None) -> tuple[Setup, SeededChooser]:
    """The setup and the choices of a seed; the kind is the seed's own if None."""
    # No cryptography: the same seed must give the same run.
    rng = random.Random(seed)  # noqa: S311
    setup = draw_setup(rng, kind)
    return setup, SeededChooser(rng, draw_likelihoods(rng))


def search(
    first_seed: int, runs: int, *, kind: str | None = None, code: Code | None = None
) -> Tally:
    """Play seed after seed, up to the first that breaks a guarantee."""
    tally = Tally()
    with _rare_collections() as collect:
        for seed in range(first_seed, first_seed + runs):
            setup, chooser = seeded(seed, kind)
            world, violation = play(setup, chooser, code or Code())
            tally.add(world)
            if violation:
                name = f"{setup.kind}:{seed}"
                tally.found = Found(name, violation, tally.runs)
                break
            collect(tally.runs)
    return tally


def first_deviations(setup: Setup, code: Code | None = None) -> list[Deviation]:
    """Every single deviation from the run without trouble."""
    chooser = ListingChooser(())
    play(setup, chooser, code or Code())
    return chooser.alternatives


def exhaust(
    name: str,
    firsts: Iterable[Deviation],
    deviations_max: int,
    *,
    code: Code | None = None,
) -> Tally:
    """Play every run that begins to deviate as given, up to the first that breaks.

    Args:
        name: of a small setup.
        firsts: first deviations.
        deviations_max: the most deviations of a run.
        code: what is under test.

    """
    setup = _small(name)
    tally = Tally()
    with _rare_collections() as collect:
        for script in _scripts(setup, firsts, deviations_max, code or Code(), tally):
            collect(tally.runs)
            if tally.found:
                found = tally.found
                tally.found = Found(f"{name}:{_spell(script)}", *_rest(found))
                break
    return tally


def _rest(found: Found) -> tuple[str, int]:
    return found.violation, found.runs


def _scripts(
    setup: Setup,
    firsts: Iterable[Deviation],
    deviations_max: int,
    code: Code,
    tally: Tally,
) -> Iterator[tuple[Deviation, ...]]:
    """Depth first: each script's run lists how it can deviate once more."""
    scripts: list[tuple[Deviation, ...]] = [(first,) for first in firsts]
    while scripts:
        script = scripts.pop()
        is_last = len(script) >= deviations_max
        chooser = ScriptedChooser(script) if is_last else ListingChooser(script)
        world, violation = play(setup, chooser, code)
        tally.add(world)
        if violation:
            tally.found = Found("", violation, tally.runs)
        if isinstance(chooser, ListingChooser):
            scripts += [(*script, each) for each in chooser.alternatives]
        yield script


def again(
    name: str, code: Code | None = None, *, is_traced: bool = True
) -> tuple[World, str | None]:
    """Play a run again by its name.

    Raises:
        ValueError: no run is called so.

    """
    setup, chooser = _named(name)
    return play(setup, chooser, code or Code(), is_traced=is_traced)


def shrink(found: Found, code: Code | None = None) -> Found:
    """Leave out every deviation that the find does not need.

    The smaller run breaks a guarantee of the same sort; it is a run of its own.
    """
    what = found.violation.partition(":")[0]
    world, _ = again(found.name, code, is_traced=False)
    stem = (
        ":".join(found.name.split(":")[:2])
        if _is_seeded(found.name)
        else (found.name.partition(":")[0])
    )
    script = [*world.chosen]
    violation = found.violation
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for each in reversed(script):
            fewer = [other for other in script if other != each]
            name = f"{stem}:{_spell(fewer)}"
            smaller, broken = again(name, code, is_traced=False)
            if broken and broken.partition(":")[0] == what:
                script, violation = [*smaller.chosen], broken
                is_smaller = True
                break
    return Found(f"{stem}:{_spell(script)}", violation, found.runs)


def _is_seeded(name: str) -> bool:
    return name.partition(":")[0] in KINDS


def _named(name: str) -> tuple[Setup, Chooser]:
    stem, *rest = name.split(":")
    try:
        if stem not in KINDS:
            return _small(stem), ScriptedChooser(_read(rest[0] if rest else ""))
        setup, chooser = seeded(int(rest[0]), stem)
        return setup, ScriptedChooser(_read(rest[1])) if rest[1:] else chooser
    except (LookupError, ValueError):
        raise ValueError(
            f"{name}: no run is called so; write KIND:SEED or SETUP:DEVIATIONS, as a "
            "find was printed"
        ) from None


def _small(name: str) -> Setup:
    return {each: setup for each, setup, _ in small_setups()}[name]


def _spell(script: Sequence[Deviation]) -> str:
    return "-".join(f"{point}.{number}" for point, number in script)


def _read(text: str) -> list[Deviation]:
    pairs = [each.split(".") for each in text.split("-") if each]
    return [(int(point), int(number)) for point, number in pairs]


class _rare_collections:  # noqa: N801 # Read as a statement: with …
    """Collect garbage every few hundred runs instead of all the time."""

    def __enter__(self) -> Callable[[int], None]:
        gc.disable()
        # What was imported is not looked through again and again.
        gc.freeze()
        return self._collect

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        gc.enable()

    def _collect(self, runs: int) -> None:
        if runs % _RUNS_A_COLLECTION == 0:
            gc.collect()
