"""Which runs are made: by a seed, or exhaustively.

Owns the shapes of the runs; must never know how one is played.
"""

import random
from collections.abc import Iterator
from typing import Final

from proof.simulated_api import POISONS, TROUBLES
from proof.world import EVENTS, Setup

KINDS: Final = ("replay", "refuse", "lookup", "none")

#: Partitions of records; a record is its order's number and its subscriber's. Two
#: orders of one subscriber and one of another, and where duplicates may stand.
_SHAPES: Final = (
    (((1, 0), (2, 0), (3, 1)),),
    (((1, 0), (3, 1)), ((2, 0),)),
    (((1, 0), (2, 0), (1, 0), (3, 1)),),
    (((1, 0), (3, 1)), ((2, 0), (1, 0))),
    (((1, 0), (3, 1), (4, 2)), ((2, 0), (5, 1))),
)
_HORIZONS: Final = (25, 50, 100)
_RARE: Final = 0.15


def draw_setup(rng: random.Random, kind: str | None = None) -> Setup:
    """A setup at random: runs differ in what they have and in what troubles them.

    The rest does not depend on whether the kind is given or drawn.
    """
    drawn = rng.choice(KINDS)
    is_few = rng.random() < 0.5  # noqa: PLR2004 # A coin.
    return Setup(
        kind=kind or drawn,
        partitions=rng.choice(_SHAPES),
        pods=rng.choice((2, 2, 3)),
        resolvers=rng.choice((1, 1, 2)),
        horizon=rng.choice(_HORIZONS),
        gives_up=rng.random() < _RARE,
        poisoned=rng.choice((1, 2)) if rng.random() < _RARE else 0,
        poison=rng.choice(POISONS),
        after_window=rng.choice(("none", "refuse")),
        tick_us=rng.choice((0, 1_000)),
        troubles=_some(rng, TROUBLES, 0.3 if is_few else 0.8),
        events=_some(rng, EVENTS, 0.4 if is_few else 0.9),
    )


def _some(rng: random.Random, every: tuple[str, ...], share: float) -> tuple[str, ...]:
    return tuple(each for each in every if rng.random() < share)


#: What the exhaustive runs leave to the seeds, to stay countable.
_FEW_EVENTS: Final = ("crash", "rebalance", "early", "jump")


def small_setups(
    kinds: tuple[str, ...] = KINDS, *, is_whole: bool = True
) -> Iterator[tuple[str, Setup, int]]:
    """The exhaustive configurations: a name, the setup, and how many deviations.

    Deviations are whatever differs from a run without trouble: a switch to another
    task, a crash, a lost answer, an answer of the API, a leap of time.

    Args:
        kinds: of recharge API.
        is_whole: two deviations everywhere; else only where there is one order.

    """
    more = 2 if is_whole else 1
    for kind in kinds:
        one = Setup(kind, (((1, 0),),), events=_FEW_EVENTS)
        yield f"{kind}-one", one, 2
        two = Setup(kind, (((1, 0), (2, 0)),), events=_FEW_EVENTS)
        yield f"{kind}-line", two, more
        apart = Setup(kind, (((1, 0), (3, 1)), ((2, 0),)), events=_FEW_EVENTS)
        yield f"{kind}-apart", apart, more
