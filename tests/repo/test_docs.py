"""The README and the docs say what the code does."""

import re
from pathlib import Path
from typing import Final

import pytest

from function.config import settings_table
from function.events import SCHEMA_FILE
from function.migrate import SCHEMA_REVISION
from function.model import TRANSITIONS, Outcome, Status

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text("utf-8")


def test_every_setting_stands_in_the_readme_as_in_the_code() -> None:
    rows = [
        f"| `{name}` | {f'`{default}`' if default else ''} | {text} |"
        for name, default, text in settings_table()
    ]

    assert [row for row in rows if row not in README] == []
    documented = re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", README, re.MULTILINE)
    assert documented == [name for name, _, _ in settings_table()]


def test_tree_in_the_readme_is_the_tree() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    named = re.findall(r"^([\w.-]+)(/?)", tree, re.MULTILINE)

    missing = [name for name, _ in named if not (ROOT / name).exists()]

    assert missing == []
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] != "." and path.name not in _MADE
    }
    assert folders == {name for name, slash in named if slash}


_MADE: Final = {"build", "topup_function.egg-info", "__pycache__"}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str
)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for text in (README, (ROOT / ".ci" / "run").read_text("utf-8")):
        for target in re.findall(r"^\$? ?make ([a-z]+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile


def test_every_transition_is_drawn() -> None:
    drawn = set(
        re.findall(
            r"^    (\w+) --> (\w+):",
            (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8"),
            re.MULTILINE,
        )
    )

    legal = {(one.value, to.value) for one, many in TRANSITIONS.items() for to in many}
    assert drawn <= legal
    statuses = {name for pair in drawn for name in pair}
    assert statuses == {status.value for status in Status}


def test_every_alert_stands_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "RUNBOOK.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", runbook, re.MULTILINE))
    code = "".join(
        path.read_text("utf-8") for path in sorted((ROOT / "function").glob("*.py"))
    )
    raised = set(re.findall(r"alert\(\s*\"([a-z_]+)\"", code))
    raised |= set(re.findall(r"telemetry\.error\(\s*\"([a-z_]+)\"", code))
    raised |= {
        outcome.value
        for outcome in Outcome
        if re.search(rf"_alert\(\s*Outcome\.{outcome.name}\.value", code)
    }

    assert raised - documented == set()


def test_newest_migration_is_the_one_that_the_code_needs() -> None:
    versions = ROOT / "function" / "migrations" / "versions"
    numbers = sorted(path.name[:4] for path in versions.glob("0*.py"))

    assert numbers[-1] == SCHEMA_REVISION


def test_schema_is_named_in_the_docs() -> None:
    assert SCHEMA_FILE.name in README
    assert SCHEMA_FILE.name in (ROOT / "docs" / "EVENTS.md").read_text("utf-8")
