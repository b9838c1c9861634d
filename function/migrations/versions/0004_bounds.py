"""Which API an order was sent to, how often it did not execute it, and when to try.

Revision 0003's code runs on beside it: one column has a default, the others may be
empty. Each step is left out where it is done, as in 0002.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add what 0003 had no use for."""
    there = {each["name"] for each in sa.inspect(op.get_bind()).get_columns("topup")}
    moment = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    ascii_text = sa.String(200).with_variant(
        mysql.VARCHAR(200, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )
    for column in (
        sa.Column("not_executed", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("not_before", moment),
        sa.Column("api_identity", ascii_text),
    ):
        if column.name not in there:
            op.add_column("topup", column)
