"""The ledger: orders, attempts, quarantine, pauses."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None


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
_BYTES = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table; nothing ran before this."""
    op.create_table(
        "topup",
        sa.Column("idempotency_key", _ascii(200), primary_key=True),
        sa.Column("fingerprint", _ascii(64), nullable=False),
        sa.Column("status", _ascii(16), nullable=False),
        sa.Column("msisdn", _ascii(16), nullable=False),
        sa.Column("channel", _ascii(200), nullable=False),
        sa.Column("amount_minor", sa.BigInteger, nullable=False),
        sa.Column("currency", _ascii(3), nullable=False),
        sa.Column("payload", _BYTES, nullable=False),
        sa.Column("topic", _unicode(249)),
        sa.Column("kafka_partition", sa.Integer),
        sa.Column("kafka_offset", sa.BigInteger),
        sa.Column("place", _MOMENT, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("updated_at", _MOMENT, nullable=False),
        sa.Column("token", _ascii(32)),
        sa.Column("lease_until", _MOMENT),
        sa.Column("rendered_key", _ascii(200), nullable=False),
        sa.Column("first_sent_at", _MOMENT),
        sa.Column("sent_at", _MOMENT),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("doubts", sa.Integer, nullable=False),
        sa.Column("last_class", _ascii(16)),
        sa.Column("reference", _unicode(200)),
        sa.Column("reason", _ascii(64), nullable=False),
        sa.Column(
            "unsettled",
            sa.Integer,
            sa.Computed(
                "CASE WHEN status IN "
                "('held', 'in_doubt', 'in_flight', 'parked', 'released') THEN 1 END",
                persisted=True,
            ),
        ),
        sa.Column(
            "active",
            sa.Integer,
            sa.Computed("CASE WHEN status = 'in_flight' THEN 1 END", persisted=True),
        ),
        sa.UniqueConstraint("msisdn", "active", name="one_in_flight_a_subscriber"),
        sa.Index("line", "msisdn", "unsettled", "place"),
        sa.Index("by_status", "status", "updated_at"),
        mysql_engine="InnoDB",
    )
    op.create_table(
        "attempt",
        sa.Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("idempotency_key", _ascii(200), nullable=False),
        sa.Column("token", _ascii(32), nullable=False),
        sa.Column("recorded_at", _MOMENT, nullable=False),
        sa.Column("classified", _ascii(16), nullable=False),
        sa.Column("is_sent", sa.Integer, nullable=False),
        sa.Column("http_status", sa.Integer),
        sa.Column("reference", _unicode(200)),
        sa.Column("reason", _ascii(64), nullable=False),
        sa.Column("words", _unicode(500), nullable=False),
        sa.Index("attempts_of", "idempotency_key", "id"),
        mysql_engine="InnoDB",
    )
    op.create_table(
        "quarantine",
        sa.Column("id", _ROW_NUMBER, primary_key=True, autoincrement=True),
        sa.Column("identity", _ascii(64), nullable=False, unique=True),
        sa.Column("outcome", _ascii(16), nullable=False),
        sa.Column("detail", _unicode(500), nullable=False),
        sa.Column("idempotency_key", _ascii(200)),
        sa.Column("topic", _unicode(249)),
        sa.Column("kafka_partition", sa.Integer),
        sa.Column("kafka_offset", sa.BigInteger),
        sa.Column("raw", _BYTES, nullable=False),
        sa.Column("announced_bytes", sa.BigInteger, nullable=False),
        sa.Column("attributes", _BYTES, nullable=False),
        sa.Column("recorded_at", _MOMENT, nullable=False),
        mysql_engine="InnoDB",
    )
    op.create_table(
        "pause",
        sa.Column("scope", _ascii(200), primary_key=True),
        sa.Column("paused_by", _unicode(200), nullable=False),
        sa.Column("reason", _unicode(500), nullable=False),
        sa.Column("paused_at", _MOMENT, nullable=False),
        mysql_engine="InnoDB",
    )
