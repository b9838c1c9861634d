"""What binds people's decisions, out of their reach; and each order's kind of API.

Revision 0002's code runs on beside it: a column that may be empty and a table are
added. Each step is left out where it is done, as in 0002.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"),
        "mysql",
        "mariadb",
    )


def upgrade() -> None:
    """Add what 0002 had no use for."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    database = sa.inspect(op.get_bind())
    if "api_kind" not in {each["name"] for each in database.get_columns("topup")}:
        op.add_column("topup", sa.Column("api_kind", _ascii(16)))
    if database.has_table("decision_rule"):
        return
    who = sa.text("'unproven'" if is_sqlite else "(CURRENT_USER())")
    now = sa.text(
        "(strftime('%Y-%m-%d %H:%M:%f', 'now'))" if is_sqlite else "(UTC_TIMESTAMP(6))"
    )
    account = sa.String(200).with_variant(
        mysql.VARCHAR(200, charset="utf8mb4", collation="utf8mb4_bin"),
        "mysql",
        "mariadb",
    )
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    op.create_table(
        "decision_rule",
        sa.Column("name", _ascii(64), primary_key=True),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("set_by", account, nullable=False, server_default=who),
        sa.Column("set_at", moment, nullable=False, server_default=now),
        mysql_engine="InnoDB",
    )
