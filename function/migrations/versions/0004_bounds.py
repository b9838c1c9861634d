"""What bounds the wait at the head of a partition, and which API an order was sent to.

Revision 0003's code runs on beside it: one column has a default, the others may be
empty. Each step is left out where it is done, as in 0002.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"


def _ascii(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"),
        "mysql",
        "mariadb",
    )


def upgrade() -> None:
    """Add what 0003 had no use for."""
    database = sa.inspect(op.get_bind())
    there = {each["name"] for each in database.get_columns("topup")}
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    for column in (
        sa.Column("not_executed", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("not_before", moment),
        sa.Column("api_identity", _ascii(200)),
    ):
        if column.name not in there:
            op.add_column("topup", column)
    if "sighting" not in database.get_table_names():
        op.create_table(
            "sighting",
            sa.Column("name", _ascii(64), primary_key=True),
            sa.Column("first_seen_at", moment, nullable=False),
            sa.Column("times", sa.Integer(), nullable=False),
        )
    indexes = {
        each["name"] for each in sa.inspect(op.get_bind()).get_indexes("sighting")
    }
    if "sighted_at" not in indexes:
        op.create_index("sighted_at", "sighting", ["first_seen_at"])
