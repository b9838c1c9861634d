"""How often the API did not execute an order, and when it may be tried again.

Revision 0003's code runs on beside it: one column has a default, the other may be
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
    for column in (
        sa.Column("not_executed", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("not_before", moment),
    ):
        if column.name not in there:
            op.add_column("topup", column)
