"""The breakages that are kept still break something, and the instrument can tell."""

from pathlib import Path

import pytest

from proof.mutate import (
    GREEN,
    INSTRUMENTS,
    RED,
    ROOT,
    BrokenMutant,
    Edit,
    Mutant,
    all_mutants,
    broken,
    read_mutant,
    require_green,
    run,
    try_mutant,
)

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_each_breakage_fits_the_code_as_it_is(mutant: Mutant) -> None:
    for edit in mutant.edits:
        assert (ROOT / edit.file).read_text("utf-8").count(edit.old) == 1, edit.file
        assert edit.old != edit.new
    for path in mutant.tests:
        assert (ROOT / path.partition("::")[0]).exists()


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 15
    assert len({each.name for each in MUTANTS}) == len(MUTANTS)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "guard.py").write_text("SAFE = True\nassert SAFE\n")
    (tmp_path / "test_guard.py").write_text(
        "import guard\ndef test_it(): assert guard.SAFE\n"
    )
    return tmp_path


def mutant(old: str = "SAFE = True", new: str = "SAFE = False") -> Mutant:
    edits = (Edit("guard.py", old, new),)
    return Mutant("unsafe", "all of it", ("tests",), ("test_guard.py",), edits)


@pytest.mark.parametrize("old", ["SAFE = Maybe", "SAFE"])
def test_old_text_that_is_not_there_exactly_once_fails_loudly(
    tree: Path, old: str
) -> None:
    before = (tree / "guard.py").read_text()

    told = pytest.raises(BrokenMutant, match=r"guard\.py: the old text")
    with told, broken(mutant(old), tree):
        pass

    assert (tree / "guard.py").read_text() == before


def test_breakage_is_taken_back(tree: Path) -> None:
    before = (tree / "guard.py").read_text()
    with broken(mutant(), tree):
        assert (tree / "guard.py").read_text() != before
    assert (tree / "guard.py").read_text() == before


def test_caught_and_survived_are_told_apart(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import guard, sys; sys.exit(0 if guard.SAFE else 1)"
    monkeypatch.setitem(INSTRUMENTS, "fuzz", ("-c", program))
    seen = mutant()
    by_fuzz = Mutant("a", "b", ("fuzz",), (), seen.edits)
    harmless = (Edit("guard.py", "assert SAFE", "pass"),)
    unseen = Mutant("a", "b", ("fuzz",), (), harmless)

    assert try_mutant(by_fuzz, tree, is_thorough=False).caught_by == "fuzz"
    result = try_mutant(unseen, tree, is_thorough=False)
    assert (result.caught_by, result.missed_by) == (None, ["fuzz"])


def test_instrument_that_is_broken_itself_has_caught_nothing(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INSTRUMENTS, "fuzz", ("-c", "raise SystemExit(3)"))
    by_fuzz = Mutant("a", "b", ("fuzz",), (), mutant().edits)

    with pytest.raises(BrokenMutant, match="no verdict"):
        try_mutant(by_fuzz, tree, is_thorough=False)
    with pytest.raises(BrokenMutant, match="although nothing is broken"):
        require_green([by_fuzz], tree)


def test_statuses_are_those_of_a_process(tree: Path) -> None:
    assert run(("-c", "pass"), tree, tree / "log") == GREEN
    assert run(("-c", "raise SystemExit(1)"), tree, tree / "log") == RED


@pytest.mark.parametrize(
    "text",
    [
        'instruments = ["tests"]\n[[edit]]\nfile = "x"\nold = "a"\nnew = "b"',
        'breaks = "x"\ninstruments = []\nedit = []',
        'breaks = "x"\ninstruments = ["luck"]\nedit = []',
        'breaks = "x"\ninstruments = ["tests"]\nedit = []',
        'breaks = "x"\ninstruments = ["crash"]\ntests = ["y"]\nedit = []',
        'breaks = "x"\ninstruments = ["crash"]\n[[edit]]\nfile = "x"',
    ],
)
def test_file_that_says_too_little_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)

    with pytest.raises(BrokenMutant, match=r"m\.toml"):
        read_mutant(path)
