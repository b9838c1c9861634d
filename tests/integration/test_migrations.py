"""The migrations build what schema.py says, on both databases."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from function.errors import LedgerUnavailable
from function.migrate import SCHEMA_REVISION, migrate, require_migrated
from function.schema import metadata
from tests.conftest import Database


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
