"""The words, the output and the exit statuses of `topup`."""

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest
from click.testing import CliRunner, Result

from demo.mariadb import MariaDb
from function import cli
from function.cli import main
from function.config import Settings
from function.errors import SettingsError
from function.grants import grants_of
from function.model import Status
from tests.conftest import Database
from tests.integration.test_operations import (
    DAY_S,
    SUBSCRIBER,
    ago,
    put,
    put_attempt,
    put_in_quarantine,
)

MASKED: Final = "+39*******567"
Run = Callable[..., Result]


@pytest.fixture
def env(sqlite_database: Database) -> dict[str, str]:
    return sqlite_database.env


@pytest.fixture
def topup(env: dict[str, str]) -> Run:
    """Runs a command as a person does; there is nobody who answers a question."""

    def run(*words: str, given: str = "", **more: str) -> Result:
        return CliRunner(env=env | more).invoke(main, list(words), input=given)

    return run


def spoken(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_commands_need_no_recharge_api_and_say_what_is_missing() -> None:
    result = CliRunner(env={"LEDGER_DATABASE_URL": ""}).invoke(main, ["ledger", "list"])

    assert result.exit_code == 1
    assert result.stderr.startswith("topup: LEDGER_DATABASE_URL is missing")
    assert "RECHARGE_API_URL" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_settings_of_the_ledger_alone_are_checked_all_the_same() -> None:
    found = Settings.ledger_only({"LEDGER_DATABASE_URL": "sqlite://"})
    assert found.recharge_api_url == ""
    with pytest.raises(SettingsError, match="LEDGER_LEASE_MARGIN_S"):
        Settings.ledger_only({"LEDGER_DATABASE_URL": "x", "LEDGER_LEASE_MARGIN_S": "0"})
    with pytest.raises(SettingsError, match="SECOND_PERSON"):
        Settings.ledger_only(
            {
                "LEDGER_DATABASE_URL": "x",
                "RESOLVE_SECOND_PERSON_ABOVE_MINOR": "-1",
            }
        )


def test_list_is_a_plain_table_with_masked_numbers(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.PARKED, age_s=7200)

    result = topup("ledger", "list")

    header, row = result.stdout.splitlines()
    assert header.split() == [
        "idempotency_key",
        "status",
        "subscriber",
        "amount",
        "age",
        "attempts",
    ]
    assert row.split() == ["app:r1", "parked", MASKED, "1000", "EUR", "2h", "1"]
    assert SUBSCRIBER not in result.output
    assert SUBSCRIBER in topup("ledger", "list", "--unmasked").stdout


def test_empty_list_says_so(topup: Run) -> None:
    assert topup("ledger", "list").stdout == "none\n"
    assert topup("ledger", "stats").stdout == "none\n"


def test_list_pages_by_what_it_prints(topup: Run, sqlite_database: Database) -> None:
    for number in range(3):
        put(sqlite_database, f"app:r{number}", Status.PARKED, age_s=100 - number)

    result = topup("ledger", "list", "--limit", "2")

    *_, more = result.stdout.splitlines()
    assert more.startswith("more: --after '")
    after = more.partition("'")[2].rstrip("'")
    page = spoken(topup("ledger", "list", "--after", after, "--json"))
    assert [row["idempotency_key"] for row in page["orders"]] == ["app:r2"]
    assert page["after"] is None


def test_list_as_json_is_filtered_and_masked(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "a%20b:r1", Status.HELD, age_s=100)
    put(sqlite_database, "app:r2", Status.HELD, age_s=100)
    put(sqlite_database, "app:r3", Status.PARKED, age_s=100)

    words = ("--status", "held", "--channel", "a b", "--older-than", "1m", "--json")
    (row,) = spoken(topup("ledger", "list", *words))["orders"]

    assert row["idempotency_key"] == "a%20b:r1"
    assert row["subscriber"] == MASKED
    assert "msisdn" not in row
    assert row["updated_at"].endswith("+00:00")
    assert topup("ledger", "list", "--older-than", "soon").exit_code == 2
    assert topup("ledger", "list", "--status", "gone").exit_code == 2


def test_show_prints_the_evidence_and_foreign_words_move_no_cursor(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r0", Status.PARKED, place_age_s=200)
    put(sqlite_database, "app:r1", Status.HELD, place_age_s=100)
    put_attempt(sqlite_database, "app:r1", "\x1b[2Jgone\r")

    result = topup("ledger", "show", "app:r1")

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "?[2Jgone?" in result.output
    assert "stands before it" in result.output
    assert "app:r0" in result.output
    shown = spoken(topup("ledger", "show", "app:r1", "--json"))
    assert [row["idempotency_key"] for row in shown["before"]] == ["app:r0"]
    assert shown["order"]["subscriber"] == MASKED


def test_refusal_is_one_line_and_a_status(topup: Run) -> None:
    result = topup("ledger", "show", "app:nobody")

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "topup: app:nobody: no such order in the ledger\n"
    # Nor may it move a person's cursor.
    result = topup("ledger", "show", "app:\udcff\x1b[2J")
    assert result.exit_code == 1
    assert result.stderr == "topup: app:??[2J: no such order in the ledger\n"


def test_stats_show_who_is_held_and_what_is_paused(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.HELD)
    put_in_quarantine(sqlite_database)
    topup("pause", "--channel", "a b", "--reason", "fraud")

    text = topup("ledger", "stats").output

    for words in ("held", MASKED, "invalid", "a%20b", "fraud", "unproven"):
        assert words in text
    assert SUBSCRIBER not in text
    found = spoken(topup("ledger", "stats", "--json"))
    assert found["statuses"][0]["count"] == 1
    assert found["held"][0]["name"] == MASKED


@pytest.mark.parametrize(
    "words", [("ledger", "list"), ("ledger", "show", "app:r1"), ("ledger", "stats")]
)
def test_who_paused_and_why_is_seen_wherever_one_looks(
    topup: Run, sqlite_database: Database, words: tuple[str, ...]
) -> None:
    put(sqlite_database, "app:r1", Status.HELD)
    topup("pause", "--all", "--reason", "their maintenance")

    text = topup(*words).stdout
    assert "paused" in text
    assert "unproven" in text
    assert "their maintenance" in text
    found = spoken(topup(*words, "--json"))
    (pause,) = found.get("paused") or found["pauses"]
    assert pause["reason"] == "their maintenance"


@pytest.mark.parametrize("number", ["393331234567", "+0123", "anna", ""])
def test_number_that_is_none_is_refused(topup: Run, number: str) -> None:
    for words in (("release", number, "--yes"), ("ledger", "list", "--subscriber")):
        result = topup(*words, *(() if "release" in words else (number,)))
        assert result.exit_code == 2
        assert "begins with +" in result.stderr


def test_number_may_be_written_as_people_do(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.HELD, msisdn="+393331234567")

    shown = topup("ledger", "list", "--subscriber", "+39 (333) 123-4567")

    assert "app:r1" in shown.stdout


def test_decision_asks_and_says_what_it_did(
    topup: Run, sqlite_database: Database
) -> None:
    topup("migrate", RECHARGE_API_URL="http://127.0.0.1:9")
    put(sqlite_database, "app:r1", Status.PARKED)
    words = ("resolve", "app:r1", "--executed", "--reference", "R-1", "--reason", "x")

    asked = topup(*words, given="n\n")
    assert asked.exit_code == 1
    assert sqlite_database.rows("decision") == []
    done = topup(*words, "--name", "ann", given="y\n")
    assert done.stdout == "app:r1: parked -> succeeded, decided by unproven\n"
    again = topup(*words, "--yes")
    assert again.exit_code == 1
    assert "a settled order never changes" in again.stderr
    assert [row["note"] for row in sqlite_database.rows("decision")] == ["ann"]


def test_nobody_who_could_answer_is_a_no(topup: Run, sqlite_database: Database) -> None:
    put(sqlite_database, "app:r1", Status.PARKED)

    for words in (
        ("resolve", "app:r1", "--abandon", "--reason", "x"),
        ("purge", "--older-than", "50d"),
        ("resume", "--all", "--reason", "x"),
        ("replay", "--quarantine", "--to", "http://127.0.0.1:9/"),
    ):
        assert topup(*words).exit_code == 1
    assert sqlite_database.row("app:r1")["status"] == "parked"


@pytest.mark.parametrize(
    "words",
    [
        ("resolve", "app:r1", "--reason", "x", "--yes"),
        ("resolve", "app:r1", "--executed", "--yes"),
        ("pause", "--reason", "x"),
        ("pause", "--all", "--channel", "app", "--reason", "x"),
        ("replay", "--to", "http://x", "--yes"),
        ("replay", "--to", "http://x", "--yes", "--quarantine", "--file", "x"),
        ("replay", "--to", "http://x", "--yes", "--from-topic", "t"),
        ("reconcile", "x.csv", "--columns", "nothing"),
        ("reconcile", "x.csv", "--columns", "who=x"),
        ("reconcile", "x.csv", "--delimiter", "ab"),
        ("forget", "-", "--key-file", "x"),
        ("grants",),
        ("nothing",),
    ],
    ids=" ".join,
)
def test_command_that_is_used_wrongly_ends_with_two(
    topup: Run, words: tuple[str, ...]
) -> None:
    assert topup(*words).exit_code == 2


def test_rules_are_the_ledgers_and_not_of_whoever_decides(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.PARKED, sent_age_s=60)
    words = ("resolve", "app:r1", "--abandon", "--reason", "x", "--yes")

    assert "topup migrate" in topup(*words).stderr
    url = {"RECHARGE_API_URL": "http://127.0.0.1:9"}
    told = topup("migrate", RECHARGE_API_SETTLE_S="120", **url)
    assert "settling time 120 s, two persons above 10000" in told.stdout
    evaded = topup(*words, RECHARGE_API_SETTLE_S="40")
    assert "settling time of 120 s" in evaded.stderr
    # Without the deployment's settings the rules stay.
    assert "settling" not in topup("migrate", RECHARGE_API_SETTLE_S="40").stdout
    assert "settling time of 120 s" in topup(*words).stderr
    assert topup("migrate", RECHARGE_API_SETTLE_S="40", **url).exit_code == 0
    assert topup(*words).exit_code == 0


@pytest.mark.parametrize("age", ["99999999999999d", "36501d", "-1d", "soon"])
def test_age_that_is_none_is_refused(topup: Run, age: str) -> None:
    result = topup("ledger", "list", "--older-than", age)

    assert result.exit_code == 2
    assert "is no age" in result.stderr


@pytest.mark.parametrize("token", [b"", b"a b", b"\xff\xfe", b"one\ntwo"])
def test_token_file_without_a_token_is_refused(
    topup: Run, tmp_path: Path, token: bytes
) -> None:
    path = tmp_path / "token"
    path.write_bytes(token)
    words = ("replay", "--quarantine", "--yes", "--to", "http://127.0.0.1:9/")

    result = topup(*words, "--token-file", str(path))

    assert result.exit_code == 2
    assert "no token in" in result.stderr
    assert topup(*words[:-1], "nonsense").exit_code == 2


def test_version_is_told_without_an_installed_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cli._version()[0].isdigit()

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", missing)
    assert "label" in cli._version()


def test_purge_refuses_with_the_arithmetic_and_counts(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.SUCCEEDED, age_s=50 * DAY_S)

    young = topup("purge", "--older-than", "30d", "--yes")
    assert young.exit_code == 1
    assert "7 + 30 + 7 = 44 days" in young.stderr
    dry = topup("purge", "--older-than", "44d", "--dry-run")
    assert "nothing was changed" in dry.stdout
    payloads = topup("purge", "--payloads", "--older-than", "30d", "--yes", "--json")
    assert spoken(payloads) == {"payloads": 1}
    counts = spoken(topup("purge", "--older-than", "44d", "--yes", "--json"))
    assert counts["succeeded"] == 1
    assert sqlite_database.rows("topup") == []


def test_number_to_forget_can_stay_out_of_the_shells_history(
    topup: Run, sqlite_database: Database, tmp_path: Path
) -> None:
    put(sqlite_database, "app:r1", Status.SUCCEEDED)
    key_file = tmp_path / "key"
    key_file.write_text(secrets.token_hex(32))
    words = ("forget", "-", "--key-file", str(key_file), "--yes")

    result = topup(*words, given=f"{SUBSCRIBER}\n")

    assert result.stdout.startswith("1 orders are now ~")
    assert SUBSCRIBER not in result.output
    assert "nothing of this subscriber" in topup(*words, given=SUBSCRIBER).stdout


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["app:r1,1000,EUR"], 0),
        (["app:r1,999,EUR"], 1),
        (["app:r1,ten,EUR"], 2),
    ],
)
def test_reconciliation_tells_by_its_status(
    topup: Run,
    sqlite_database: Database,
    tmp_path: Path,
    lines: list[str],
    status: int,
) -> None:
    put(sqlite_database, "app:r1", Status.SUCCEEDED)
    path = tmp_path / "statement.csv"
    path.write_text("\n".join(["Key,Sum,Cur", *lines]))
    words = (
        *("reconcile", str(path), "--columns", "key=Key,amount=Sum,currency=Cur"),
        *("--from", ago(7200)[:19], "--to", ago(-60)[:19]),
    )

    result = topup(*words)

    assert result.exit_code == status, result.output
    assert ("topup: not compared: line 2" in result.stderr) is (status == 2)
    if status != 2:
        *differences, summary = topup(*words, "--json").stdout.splitlines()
        assert len(differences) == status
        assert json.loads(summary)["summary"]["matched"] == 1 - status


def test_reconciliation_without_a_ledger_is_not_called_a_difference(
    tmp_path: Path,
) -> None:
    path = tmp_path / "statement.csv"
    path.write_text("key,amount,currency,executed_at\na:1,1,EUR,2026-01-01\n")

    env = {"LEDGER_DATABASE_URL": f"sqlite:///{tmp_path / 'unmigrated.db'}"}

    result = CliRunner(env=env).invoke(main, ["reconcile", str(path)])

    assert result.exit_code == 2
    assert result.stderr.startswith("topup: not compared: ")


def test_grants_are_printed_without_any_setting() -> None:
    result = CliRunner().invoke(
        main,
        ["grants", "--database", "ledger", "--operator", "ann", "--operator", "bob"],
    )

    assert result.exit_code == 0
    assert "TO `ann`@`%`;" in result.stdout
    assert "TO `bob`@`%`;" in result.stdout
    assert "topup_operator" not in result.stdout
    assert "`topup_function`@`%` REQUIRE SSL ACCOUNT LOCK" in result.stdout


class StandInResolver:
    """What cli.py expects of function.resolver.Resolver, and nothing of its work."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run_once(self) -> Mapping[str, int]:
        return {"looked_up": 3, "drained": 2}

    def run(self, stop: threading.Event, interval_s: float) -> None:
        assert not stop.is_set()
        assert interval_s == 10

    def drain(self, msisdn: str) -> int:
        assert msisdn == SUBSCRIBER
        return 1


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands' side of the seam; the resolver has tests of its own."""
    module = ModuleType("function.resolver")
    module.make_resolver = StandInResolver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "function.resolver", module)


@pytest.mark.usefixtures("resolver")
def test_resolver_is_run_and_its_counts_are_printed(
    topup: Run, sqlite_database: Database
) -> None:
    needs_all = topup("resolver", "run-once")
    assert needs_all.exit_code == 1
    assert "RECHARGE_API_URL is missing" in needs_all.stderr
    url = {"RECHARGE_API_URL": "http://127.0.0.1:9"}
    counts = topup("resolver", "run-once", "--json", **url)
    assert spoken(counts) == {"looked_up": 3, "drained": 2}
    assert "looked_up  3" in topup("resolver", "run-once", **url).stdout
    put(sqlite_database, "app:r1", Status.HELD)
    topup("pause", "--channel", "app", "--reason", "fraud")
    paused = topup("release", SUBSCRIBER, "--yes", **url)
    assert paused.exit_code == 1
    assert "app is paused by unproven: fraud" in paused.stderr
    topup("resume", "--channel", "app", "--reason", "mended", "--yes")
    released = topup("release", SUBSCRIBER, "--yes", **url)
    assert released.stdout.splitlines()[-1] == "1 of 1 run"
    assert SUBSCRIBER not in released.output


# -- As a process, on the real server -----------------------------------------------


def process(env: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("topup")
    return subprocess.run(
        [program, *words],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_two_operators_resolve_as_themselves_from_their_own_processes(
    mariadb: MariaDb, mariadb_database: Database
) -> None:
    put(mariadb_database, "app:r1", Status.PARKED, amount_minor=10_001)
    url = {"RECHARGE_API_URL": "http://127.0.0.1:9"}
    assert process(mariadb_database.env | url, "migrate").returncode == 0
    put(mariadb_database, "app:r2", Status.HELD, place_age_s=10)
    people = {}
    for name in ("ann", "bob"):
        user = f"{name}_{secrets.token_hex(4)}"
        password = secrets.token_urlsafe(16)
        mariadb.create_user(user, password, grants_of("operator", "ledger"))
        people[user] = mariadb_database.env | {
            "LEDGER_DATABASE_URL": mariadb.url("ledger", user, password)
        }
    words = ("resolve", "app:r1", "--not-executed", "--reason", "asked", "--yes")
    try:
        (ann, ann_env), (bob, bob_env) = people.items()

        # What she sets for herself binds nobody, and her account can't set more.
        ann_env["RESOLVE_SECOND_PERSON_ABOVE_MINOR"] = "1000000"
        assert process(ann_env, "migrate").returncode == 1
        first = process(ann_env, *words, "--name", bob)
        assert (first.returncode, first.stderr) == (0, "")
        assert f"proposed by {ann}@%; still parked" in first.stdout
        second = process(bob_env, *words)
        assert second.stdout == f"app:r1: parked -> held, decided by {bob}@%\n"
        third = process(bob_env, *words)
        assert third.returncode == 1
        assert third.stderr.startswith("topup: app:r1 is held: ")
        put(mariadb_database, "app:old", Status.SUCCEEDED, age_s=50 * DAY_S)
        purge = process(ann_env, "purge", "--older-than", "44d", "--yes")
        assert purge.returncode == 1
        assert "this database account has no right to do that" in purge.stderr
        assert purge.stderr.count("\n") == 1
    finally:
        with mariadb.root_connect() as connection, connection.cursor() as cursor:
            for user in people:
                cursor.execute(f"DROP USER `{user}`")

    signed = [row["decided_by"] for row in mariadb_database.rows("decision")]
    assert signed == [f"{ann}@%", f"{bob}@%"]


def test_statuses_of_a_real_process(env: dict[str, str], tmp_path: Path) -> None:
    assert process(env, "ledger", "stats").returncode == 0
    assert process(env, "ledger", "show", "x").returncode == 1
    assert process(env, "nothing").returncode == 2
    assert process(env, "purge", "--older-than", "50d").returncode == 1
    path = tmp_path / "statement.csv"
    path.write_text("key,amount,currency,executed_at\na:1,1,EUR,2026-01-01T00:00:00Z\n")
    assert process(env, "reconcile", str(path)).returncode == 1
    assert process({}, "ledger", "list").returncode == 1


def test_migrate_notes_the_api_of_what_an_earlier_revision_sent(
    topup: Run, sqlite_database: Database
) -> None:
    put(sqlite_database, "app:r1", Status.PARKED)
    put(sqlite_database, "app:r2", Status.ACCEPTED)
    assert "not known" in topup("ledger", "stats").stdout
    url = {"RECHARGE_API_URL": "http://api.example/v1"}

    noted = topup("migrate", **url).stdout
    again = topup("migrate", **url).stdout

    said = "noted that 2 open orders were sent to generic@api.example/v1"
    assert said in noted
    assert "noted" not in again
    (row,) = spoken(topup("ledger", "stats", "--json"))["apis"]
    assert (row["name"], row["count"]) == ("generic@api.example/v1", 2)
