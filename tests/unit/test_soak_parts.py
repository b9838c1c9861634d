"""Small parts of the soak: who orders, what is counted, what is drawn."""

from collections import Counter
from pathlib import Path

from proof.meter import Sample, Tally
from proof.nemesis import Happened
from proof.timeline import draw
from proof.traffic import SUBSCRIBERS, number_of


def test_every_subscriber_has_a_number_of_their_own() -> None:
    numbers = Counter(number_of(rank) for rank in range(SUBSCRIBERS))

    assert len(numbers) == SUBSCRIBERS
    assert all(len(number) == len("+12015550100") for number in numbers)


def test_tally_counts_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    tally = Tally(path)
    tally.update()
    assert (tally.calls, tally.executed) == (0, 0)

    path.write_text('{"entry":"called"}\n{"entry":"executed"}\n{"entry":"exec')
    tally.update()
    tally.update()
    assert (tally.calls, tally.executed, tally.rejected) == (1, 1, 0)

    with path.open("a") as file:
        file.write('uted"}\n{"entry":"rejected"}\n')
    tally.update()
    assert (tally.calls, tally.executed, tally.rejected) == (1, 2, 1)


def test_timeline_is_drawn_with_gaps_and_also_of_nothing(tmp_path: Path) -> None:
    samples = [
        Sample(float(n), 10 * n, 11 * n, None if n % 5 else n, {"held": n})
        for n in range(40)
    ]
    faults = [
        Happened("broker_killed", "processes", "broker", 3.0, 9.0),
        Happened("cut source->function", "connections", "a->function", 5.0, 5.0),
        Happened("outage", "recharge_api", "all", 30.0, 34.0),
    ]

    draw(tmp_path / "a.png", samples, faults, faults_end_s=35.0, title="a")
    draw(tmp_path / "b.svg", [], [], faults_end_s=0.0, title="nothing")

    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "b.svg").read_text()
