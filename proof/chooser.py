"""Every choice of a simulated run: drawn by a seed, or read from a list.

Owns the numbering of choice points; must never know what is chosen.

At each point there is a default and perhaps some alternatives. A run is its deviations:
the points at which it took an alternative, and which. So any run can be repeated from
that list alone, and made smaller by leaving deviations out.
"""

import random
from collections.abc import Sequence
from typing import Final

#: Alternative number at the point of this number; both from 0.
Deviation = tuple[int, int]


class Point:
    """What kind of choice it is; a seed gives each its own likelihood.

    Plain numbers: an Enum's hash, asked at each step, would be half the cost of a run.
    """

    #: Who goes on, and what happens around them.
    SCHEDULE: Final = 0
    #: What the ledger's connection does to a statement.
    LEDGER: Final = 1
    #: What the recharge API does with a request.
    API: Final = 2
    #: Everything of less consequence: which pod, how late.
    DETAIL: Final = 3


class Chooser:
    """Takes every default; the base of the others."""

    def __init__(self) -> None:
        self.taken: list[Deviation] = []
        self.points = 0

    def deviates(self, point: int) -> bool:  # noqa: ARG002
        """Pass a choice point; true if `pick` is to be asked."""
        self.points += 1
        return False

    def pick(self, alternatives: int) -> int | None:  # noqa: ARG002
        """The number of the alternative that is taken, or None for the default."""
        return None


class SeededChooser(Chooser):
    """Deviates at random, as likely as it is told for each kind of point."""

    def __init__(self, rng: random.Random, likelihood: tuple[float, ...]) -> None:
        super().__init__()
        self._random = rng.random
        self._likelihood = likelihood

    def deviates(self, point: int) -> bool:
        """As `Chooser.deviates`."""
        self.points += 1
        return self._random() < self._likelihood[point]

    def pick(self, alternatives: int) -> int | None:
        """As `Chooser.pick`."""
        if not alternatives:
            return None
        number = int(self._random() * alternatives)
        self.taken.append((self.points - 1, number))
        return number


class ScriptedChooser(Chooser):
    """Takes the deviations that it is given, and no other."""

    def __init__(self, script: Sequence[Deviation]) -> None:
        super().__init__()
        self._script = dict(script)

    def deviates(self, point: int) -> bool:  # noqa: ARG002
        """As `Chooser.deviates`."""
        self.points += 1
        return self.points - 1 in self._script

    def pick(self, alternatives: int) -> int | None:
        """As `Chooser.pick`."""
        number = self._script[self.points - 1]
        if number >= alternatives:
            # A smaller script has led elsewhere: there is no such alternative here.
            return None
        self.taken.append((self.points - 1, number))
        return number


class ListingChooser(ScriptedChooser):
    """As scripted, and lists every alternative behind the last deviation."""

    def __init__(self, script: Sequence[Deviation]) -> None:
        super().__init__(script)
        self._from = max((point for point, _ in script), default=-1)
        self.alternatives: list[Deviation] = []

    def deviates(self, point: int) -> bool:
        """As `Chooser.deviates`."""
        return super().deviates(point) or self.points - 1 > self._from

    def pick(self, alternatives: int) -> int | None:
        """As `Chooser.pick`."""
        here = self.points - 1
        if here > self._from:
            self.alternatives += [(here, number) for number in range(alternatives)]
            return None
        return super().pick(alternatives)


#: By kind of point. Runs of the API's troubles alone find other things than runs in
#: which nothing holds still, so each run draws its own.
_LIKELIHOODS: Final = (
    (0.03, 0.08, 0.2, 0.4),
    (0.0, 0.01, 0.04, 0.12),
    (0.1, 0.3, 0.6, 0.9),
    (0.1, 0.4),
)


def draw_likelihoods(rng: random.Random) -> tuple[float, ...]:
    """A likelihood a kind of point: runs differ in what troubles them."""
    return tuple(rng.choice(each) for each in _LIKELIHOODS)
