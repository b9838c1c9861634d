"""The API operator's statement against the ledger, on both databases."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from function.model import Status
from function.reconcile import (
    Format,
    Kind,
    StatementUnreadable,
    Summary,
    reconcile,
)
from tests.conftest import Database
from tests.integration.test_operations import DAY_S, ago, put

HEADER: Final = "key,amount,currency,executed_at,reference"


class Statement:
    """A statement as the API's operator sends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [HEADER]

    def add(
        self,
        key: str,
        amount: str = "1000",
        *,
        currency: str = "EUR",
        age_s: float = 3600,
        reference: str = "R-1",
    ) -> None:
        at = ago(age_s).replace(" ", "T") + "Z"
        self.lines.append(f"{key},{amount},{currency},{at},{reference}")


@pytest.fixture
def statement(tmp_path: Path) -> Statement:
    return Statement(tmp_path / "statement.csv")


def day() -> Format:
    """From two hours ago until one minute from now."""
    now = datetime.now(UTC)
    return Format(begin=now - timedelta(hours=2), end=now + timedelta(minutes=1))


def run(
    database: Database, statement: Statement, format_: Format | None = None
) -> tuple[list[tuple[str, str]], Summary]:
    statement.path.write_text("\n".join(statement.lines) + "\n", "utf-8")
    summary = Summary()
    found = list(reconcile(database.engine, statement.path, format_ or day(), summary))
    assert sum(summary.differences.values()) == len(found)
    assert summary.is_clean is (found == [])
    return [(difference.kind.value, difference.key) for difference in found], summary


def test_what_both_say_is_matched(database: Database, statement: Statement) -> None:
    for number, status in enumerate((Status.SUCCEEDED, Status.ACCEPTED)):
        put(database, f"app:r{number}", status, msisdn=f"+100000{number}")
        statement.add(f"app:r{number}")

    differences, summary = run(database, statement)

    assert differences == []
    assert summary.matched == 2


def test_executed_there_and_unknown_here_is_told(
    database: Database, statement: Statement
) -> None:
    put(database, "app:r1", Status.SUCCEEDED)
    statement.add("app:r1")
    statement.add("app:stranger")
    statement.add("é:stranger")

    differences, summary = run(database, statement)

    assert differences == [
        ("unknown_to_us", "app:stranger"),
        ("unknown_to_us", "é:stranger"),
    ]
    assert summary.matched == 1


def test_succeeded_here_and_missing_there_is_told(
    database: Database, statement: Statement
) -> None:
    put(database, "app:r1", Status.SUCCEEDED)
    put(database, "app:r2", Status.SUCCEEDED, msisdn="+1000001")
    statement.add("app:r1")

    differences, _ = run(database, statement)

    assert differences == [("missing_there", "app:r2")]


def test_success_at_the_edge_of_the_period_is_not_judged(
    database: Database, statement: Statement
) -> None:
    """It was executed between its claim and its settlement, on either side."""
    put(database, "app:before", Status.SUCCEEDED, age_s=3 * 3600)
    put(
        database,
        "app:edge",
        Status.SUCCEEDED,
        msisdn="+1000001",
        age_s=3600,
        sent_age_s=3 * 3600,
    )
    statement.add("app:stranger")

    differences, summary = run(database, statement)

    assert differences == [("unknown_to_us", "app:stranger")]
    assert summary.not_judged == 1


@pytest.mark.parametrize(("amount", "currency"), [("999", "EUR"), ("1000", "CHF")])
def test_other_amount_or_currency_is_told(
    database: Database, statement: Statement, amount: str, currency: str
) -> None:
    put(database, "app:r1", Status.SUCCEEDED)
    statement.add("app:r1", amount, currency=currency)

    assert run(database, statement)[0] == [("amount_differs", "app:r1")]


@pytest.mark.parametrize(
    "status",
    [Status.IN_DOUBT, Status.PARKED, Status.HELD, Status.RELEASED, Status.IN_FLIGHT],
)
def test_executed_there_and_open_here_names_the_command(
    database: Database, statement: Statement, status: Status
) -> None:
    put(database, "app:r1", status)
    statement.add("app:r1", reference="it's R-1")
    statement.path.write_text("\n".join(statement.lines))

    (found,) = reconcile(database.engine, statement.path, day(), Summary())

    assert found.kind is Kind.EXECUTED_BUT_OPEN
    assert found.todo == (
        "topup resolve app:r1 --executed --reference 'it'\"'\"'s R-1' "
        "--reason 'stands in the statement'"
    )


@pytest.mark.parametrize("status", [Status.REJECTED, Status.ABANDONED])
def test_executed_there_and_ended_here_is_told(
    database: Database, statement: Statement, status: Status
) -> None:
    put(database, "app:r1", status)
    statement.add("app:r1")

    assert run(database, statement)[0] == [("executed_but_ended", "app:r1")]


def test_key_with_two_lines_is_a_double(
    database: Database, statement: Statement
) -> None:
    put(database, "app:r1", Status.SUCCEEDED)
    statement.add("app:r1")
    statement.add("app:r1", reference="R-2")

    assert run(database, statement)[0] == [("executed_several_times", "app:r1")]


def test_key_is_the_one_that_the_api_was_given(
    database: Database, statement: Statement
) -> None:
    put(database, "app:r1", Status.SUCCEEDED, rendered_key="0f0f")
    put(database, "0f0f", Status.PARKED, msisdn="+1000001", rendered_key="other")
    statement.add("0f0f")

    differences, summary = run(database, statement)

    assert differences == []
    assert summary.matched == 1


def test_row_that_changed_long_before_is_found_by_its_key(
    database: Database, statement: Statement
) -> None:
    """Parked 50 days ago and executed, says the statement, an hour ago."""
    put(database, "app:r1", Status.PARKED, age_s=50 * DAY_S)
    statement.add("app:r1")

    assert run(database, statement)[0] == [("executed_but_open", "app:r1")]


def test_many_rows_are_compared_in_batches(
    database: Database, statement: Statement
) -> None:
    for number in range(1203):
        put(database, f"app:r{number}", Status.SUCCEEDED, msisdn=f"+10{number:05}")
        if number != 700:
            statement.add(f"app:r{number}")
    at = ago(3600)
    database.execute("UPDATE topup SET updated_at = :at", at=at)

    differences, summary = run(database, statement)

    assert differences == [("missing_there", "app:r700")]
    assert summary.matched == 1202


def test_period_is_the_files_own_unless_it_is_told(
    database: Database, statement: Statement
) -> None:
    for number, age_s in enumerate((3600, 1800, 600)):
        put(
            database,
            f"app:r{number}",
            Status.SUCCEEDED,
            msisdn=f"+100000{number}",
            age_s=age_s,
        )
    statement.add("app:r0", age_s=3600)
    statement.add("app:r2", age_s=600)

    differences, summary = run(database, statement, Format())

    assert differences == [("missing_there", "app:r1")]
    assert summary.begin is not None
    assert summary.end is not None
    assert 2990 < (summary.end - summary.begin).total_seconds() < 3010


def test_columns_units_and_signs_are_mapped(
    database: Database, statement: Statement
) -> None:
    put(database, "app:r1", Status.SUCCEEDED, amount_minor=123450)
    statement.lines = [
        "\ufeffState;Idempotency-Key;Betrag;Ccy;Other",
        "OK;app:r1;1234,50;eur;x",
        "FAILED;app:r2;zwei;eur;x",
        "",
    ]
    format_ = Format(
        columns={
            "key": "Idempotency-Key",
            "amount": "Betrag",
            "currency": "Ccy",
            "status": "State",
        },
        is_major=True,
        delimiter=";",
        decimal=",",
        begin=day().begin,
        end=day().end,
    )

    differences, summary = run(database, statement, format_)

    assert differences == []
    assert (summary.matched, summary.not_executed) == (1, 1)


@pytest.mark.parametrize(
    ("currency", "amount", "amount_minor"),
    [("JPY", "500", 500), ("TND", "1.234", 1234), ("EUR", "5", 500)],
)
def test_major_units_follow_the_currencys_decimals(
    database: Database,
    statement: Statement,
    currency: str,
    amount: str,
    amount_minor: int,
) -> None:
    put(database, "app:r1", Status.SUCCEEDED, amount_minor=amount_minor)
    database.execute("UPDATE topup SET currency = :currency", currency=currency)
    statement.add("app:r1", amount, currency=currency)
    period = day()
    format_ = Format(is_major=True, begin=period.begin, end=period.end)

    assert run(database, statement, format_)[0] == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "needs a header"),
        (["key,amount"], "no column currency"),
        ([HEADER, "app:r1,1000,EUR"], "line 2 has 3 cells"),
        ([HEADER, "app:r1,10.5,EUR,,"], "line 2: the amount is no whole"),
        ([HEADER, "app:r1,ten,EUR,,"], "line 2: no amount"),
        ([HEADER, "app:r1,NaN,EUR,,"], "line 2"),
        ([HEADER, "app:r1,-1,EUR,,"], "line 2: the amount is out of bounds"),
        ([HEADER, "app:r1,1,EUR,yesterday,"], "line 2: the time"),
        ([HEADER, ",1,EUR,,"], "line 2 has no key"),
        ([HEADER, "app:r1,1,EUR,,"], "no line tells a time"),
    ],
)
def test_statement_that_cannot_be_read_is_refused_whole(
    sqlite_database: Database,
    tmp_path: Path,
    lines: list[str],
    message: str,
) -> None:
    path = tmp_path / "statement.csv"
    path.write_text("\n".join(lines))

    with pytest.raises(StatementUnreadable, match=message):
        list(reconcile(sqlite_database.engine, path, Format(), Summary()))


def test_bytes_that_are_no_text_and_missing_files_are_refused(
    sqlite_database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "statement.csv"
    with pytest.raises(StatementUnreadable, match="No such file"):
        list(reconcile(sqlite_database.engine, path, Format(), Summary()))
    path.write_bytes(HEADER.encode() + b"\n\xff\xfe,1,EUR,,\n")
    with pytest.raises(StatementUnreadable, match="UTF-8"):
        list(reconcile(sqlite_database.engine, path, Format(), Summary()))


def test_mapped_column_that_is_not_there_is_refused(
    sqlite_database: Database, statement: Statement
) -> None:
    statement.add("app:r1")

    with pytest.raises(StatementUnreadable, match="no column Zeit"):
        run(sqlite_database, statement, Format(columns={"executed_at": "Zeit"}))


def test_ledger_is_only_read(database: Database, statement: Statement) -> None:
    put(database, "app:r1", Status.PARKED)
    statement.add("app:r1")
    before = database.rows("topup")

    run(database, statement)

    assert database.rows("topup") == before
