"""The migrations build what schema.py says, on both databases."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from function.api_profile import load_profile
from function.errors import LedgerUnavailable
from function.migrate import SCHEMA_REVISION, migrate, note_api, require_migrated
from function.model import Answer, AnswerClass
from function.schema import metadata
from tests.conftest import Database, settings_of
from tests.orders import order


def test_migrated_database_is_what_the_code_thinks_it_is(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": False}
        )

        assert compare_metadata(context, metadata) == []


def test_keys_compare_byte_by_byte_on_mariadb(mariadb_database: Database) -> None:
    with mariadb_database.engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT table_name, column_name, collation_name"
                " FROM information_schema.columns WHERE table_schema = DATABASE()"
                " AND collation_name IS NOT NULL AND table_name <> 'alembic_version'"
            )
        ).all()

    assert rows
    assert {row[2] for row in rows} == {"ascii_bin", "utf8mb4_bin"}
    assert ("topup", "idempotency_key", "ascii_bin") in {tuple(row) for row in rows}


def test_times_have_microseconds_on_mariadb(mariadb_database: Database) -> None:
    columns = inspect(mariadb_database.engine).get_columns("topup")
    moments = [each for each in columns if "DATETIME" in str(each["type"]).upper()]

    assert len(moments) == 8
    assert {getattr(each["type"], "fsp", None) for each in moments} == {6}


def test_unmigrated_database_is_said_in_words(database: Database) -> None:
    database.execute("UPDATE alembic_version SET version_num = '0000'")
    try:
        with pytest.raises(LedgerUnavailable, match="topup migrate"):
            require_migrated(database.engine)
    finally:
        database.execute(
            "UPDATE alembic_version SET version_num = :head", head=SCHEMA_REVISION
        )
    require_migrated(database.engine)


def test_migrating_again_changes_nothing(database: Database) -> None:
    assert migrate(database.engine) == migrate(database.engine) == SCHEMA_REVISION


def test_open_orders_of_the_revision_before_are_noted_once(
    database: Database,
) -> None:
    """What was never sent, or is ended, or is noted already, stays as it is."""
    profile = load_profile(settings_of({"LEDGER_DATABASE_URL": "sqlite://"}))
    ledger = database.make_ledger(profile, lease_s=30)
    claim = ledger.claim(order("settled"))
    assert claim
    assert ledger.settle("app:settled", claim.token, Answer(AnswerClass.DONE))
    assert ledger.claim(order("open", msisdn="+393330000001"))
    assert ledger.claim(order("noted", msisdn="+393330000002"))
    assert ledger.hold(order("held", msisdn="+393330000002"))
    database.change(api_identity=None)
    database.change("app:noted", api_identity="generic@other")

    assert note_api(database.engine, "generic@old") == 1
    assert note_api(database.engine, "generic@new") == 0

    noted = {
        row["idempotency_key"]: row["api_identity"] for row in database.rows("topup")
    }
    assert noted == {
        "app:settled": None,
        "app:open": "generic@old",
        "app:noted": "generic@other",
        "app:held": None,
    }
