"""Alembic's entry: runs the revisions on the connection that function.migrate holds."""

from alembic import context

from function.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # The caller's lock, and on SQLite its transaction, are around everything.
    transactional_ddl=False,
)
context.run_migrations()
