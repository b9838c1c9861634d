"""The picture of a soak: throughput, lag and doubt over time, faults as bands.

Owns the drawing; must never change a number that it was given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from proof.meter import Sample
from proof.nemesis import Happened

#: An instant fault is drawn so wide, in seconds, or it would not be seen.
_WIDTH_S_MIN: Final = 0.6
#: Throughput is the mean of so many seconds.
_WINDOW_S: Final = 5
_COLOURS: Final = {
    "processes": "#b2182b",
    "connections": "#e08214",
    "recharge_api": "#5e3c99",
}
_LANES: Final = {"processes": 2, "connections": 1, "recharge_api": 0}


def draw(
    path: Path,
    samples: Sequence[Sample],
    faults: Sequence[Happened],
    *,
    faults_end_s: float,
    title: str,
) -> None:
    """Write the picture; the file's suffix says whether as PNG or SVG.

    Args:
        path: where.
        samples: one a second.
        faults: what the nemesis did.
        faults_end_s: when the faults stopped, and the drain began.
        title: above it.

    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    throughput, lag, doubt, bands = figure.subplots(
        4, 1, sharex=True, height_ratios=[3, 2, 2, 2]
    )
    figure.suptitle(title, fontsize=11)
    _draw_throughput(throughput, samples)
    _draw_lag(lag, samples)
    _draw_doubt(doubt, samples)
    _draw_faults(bands, faults)
    for axes in (throughput, lag, doubt):
        axes.grid(visible=True, alpha=0.3)
        axes.set_ylim(bottom=0)
        for fault in faults:
            if fault.track == "processes":
                axes.axvspan(
                    *_span(fault), color=_COLOURS[fault.track], alpha=0.12, lw=0
                )
    for axes in (throughput, lag, doubt, bands):
        axes.axvline(faults_end_s, color="black", lw=1, ls="--")
    bands.set_xlabel("seconds; dashed: the faults end, the system drains")
    figure.savefig(path, dpi=110)


def _draw_throughput(axes: Axes, samples: Sequence[Sample]) -> None:
    times, rates = [], []
    for before, now in zip(samples, samples[_WINDOW_S:], strict=False):
        times.append(now.at_s)
        rates.append((now.executed - before.executed) / (now.at_s - before.at_s))
    axes.plot(times, rates, color="#2166ac", lw=1)
    axes.set_ylabel(f"recharges/s\n(mean of {_WINDOW_S} s)")


def _draw_lag(axes: Axes, samples: Sequence[Sample]) -> None:
    known = [(each.at_s, each.lag) for each in samples if each.lag is not None]
    axes.plot(*zip(*known, strict=True), color="#1b7837", lw=1) if known else None
    axes.set_ylabel("lag\n(records)")


def _draw_doubt(axes: Axes, samples: Sequence[Sample]) -> None:
    known = [(s.at_s, s.unsettled) for s in samples if s.unsettled is not None]
    times = [at_s for at_s, _ in known]
    for name, statuses, colour in (
        ("in doubt or parked", ("in_doubt", "parked"), "#b2182b"),
        ("held", ("held",), "#e08214"),
        ("released", ("released",), "#878787"),
    ):
        counts = [sum(by.get(status, 0) for status in statuses) for _, by in known]
        axes.plot(times, counts, label=name, color=colour, lw=1)
    axes.legend(loc="upper left", fontsize=8)
    axes.set_ylabel("orders")


def _draw_faults(axes: Axes, faults: Sequence[Happened]) -> None:
    for fault in faults:
        began_s, ended_s = _span(fault)
        lane = _LANES[fault.track]
        axes.broken_barh(
            [(began_s, ended_s - began_s)],
            (lane + 0.1, 0.8),
            color=_COLOURS[fault.track],
        )
        # More than a few names are a black bar.
        if fault.track == "processes" and len(faults) < _NAMED_MAX:
            axes.text(began_s, lane + 0.5, fault.name, fontsize=6, rotation=30)
    axes.set_yticks([lane + 0.5 for lane in _LANES.values()])
    axes.set_yticklabels(name.replace("_", " ") for name in _LANES)
    axes.set_ylim(0, len(_LANES) + 0.7)


_NAMED_MAX: Final = 120


def _span(fault: Happened) -> tuple[float, float]:
    return fault.began_s, max(fault.ended_s, fault.began_s + _WIDTH_S_MIN)
