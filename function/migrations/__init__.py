"""Alembic's environment and revisions; run by `topup migrate`."""
