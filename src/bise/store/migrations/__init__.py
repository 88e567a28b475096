"""The schema's history, one Alembic revision a file; `bise.store.database` applies them at start."""
