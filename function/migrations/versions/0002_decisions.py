"""What people do to the ledger: decisions, switches, and whose they are.

Revision 0001's code runs on beside it: columns and tables are added, none is changed
but for defaults, which only fill what a statement leaves out.

Each step is left out where it is done: on MySQL every DDL statement commits by itself,
so a run that was killed in the middle is finished by the next.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"),
        "mysql",
        "mariadb",
    )


def _unicode(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin"),
        "mysql",
        "mariadb",
    )


_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add what 0001 had no use for."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    # The account that is logged on, not the name that a client claims; the server
    # fills it in, because operators are granted every column but these two.
    who = sa.text("'unproven'" if is_sqlite else "(CURRENT_USER())")
    now = sa.text(
        "(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "(UTC_TIMESTAMP(6))"
    )
    database = sa.inspect(op.get_bind())
    if "looked_at" not in {each["name"] for each in database.get_columns("topup")}:
        op.add_column("topup", sa.Column("looked_at", _MOMENT))
    indexes = {each["name"] for each in database.get_indexes("quarantine")}
    for name, column in (
        ("quarantined_by_key", "idempotency_key"),
        ("quarantined_at", "recorded_at"),
    ):
        if name not in indexes:
            op.create_index(name, "quarantine", [column])
    if not database.has_table("decision"):
        op.create_table(
            "decision",
            sa.Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
            sa.Column("idempotency_key", _ascii(200), nullable=False),
            sa.Column("token", _ascii(32), nullable=False),
            sa.Column("from_status", _ascii(16), nullable=False),
            sa.Column("verdict", _ascii(16), nullable=False),
            sa.Column("reference", _unicode(200)),
            sa.Column("reason", _unicode(500), nullable=False),
            sa.Column("note", _unicode(200), nullable=False),
            sa.Column("decided_by", _unicode(200), nullable=False, server_default=who),
            sa.Column("decided_at", _MOMENT, nullable=False, server_default=now),
            sa.Index("decisions_of", "idempotency_key", "id"),
            mysql_engine="InnoDB",
        )
    # SQLite can't change a column: the table, which has a row a pause, is built anew.
    with op.batch_alter_table("pause") as pause:
        pause.alter_column(
            "paused_by",
            existing_type=_unicode(200),
            existing_nullable=False,
            server_default=who,
        )
        pause.alter_column(
            "paused_at",
            existing_type=_MOMENT,
            existing_nullable=False,
            server_default=now,
        )
    if not database.has_table("pause_log"):
        op.create_table(
            "pause_log",
            sa.Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
            sa.Column("scope", _ascii(200), nullable=False),
            sa.Column("action", _ascii(16), nullable=False),
            sa.Column("reason", _unicode(500), nullable=False),
            sa.Column("switched_by", _unicode(200), nullable=False, server_default=who),
            sa.Column("switched_at", _MOMENT, nullable=False, server_default=now),
            mysql_engine="InnoDB",
        )
