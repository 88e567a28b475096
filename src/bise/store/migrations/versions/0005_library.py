"""Archive, personas, parts of messages, passages of documents; search without accents everywhere."""

import hashlib
import unicodedata

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns and make the tables."""
    op.add_column("conversations", sa.Column("archived_at", sa.Double))
    op.add_column("conversations", sa.Column("persona_id", sa.String(36)))
    op.add_column("messages", sa.Column("parts", sa.JSON, nullable=False, server_default=sa.text("'[]'")))
    op.add_column("documents", sa.Column("pages", sa.JSON, nullable=False, server_default=sa.text("'[]'")))
    op.create_table(
        "personas",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("owner", sa.String(200), nullable=False, index=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("system", sa.Text, nullable=False),
        sa.Column("model", sa.String(300)),
        sa.Column("params", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.UniqueConstraint("owner", "name"),
    )
    op.create_table(
        "passages",
        sa.Column(
            "document_id",
            sa.String(36),
            sa.ForeignKey("documents.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("model", sa.String(300), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        _fold_search()
    else:
        _number_search()


def _number_search() -> None:
    """Give SQLite's rows of the index numbers that follow from what they hold, so that no scan finds them."""
    bind = op.get_bind()
    rows = bind.execute(sa.text("SELECT conversation_id, message_id, text FROM message_search")).all()
    bind.execute(sa.text("DELETE FROM message_search"))
    for conversation, message, content in rows:
        digest = hashlib.blake2b(f"{conversation} {message}".encode(), digest_size=8).digest()
        bind.execute(
            sa.text(
                "INSERT INTO message_search (rowid, conversation_id, message_id, text) "
                "VALUES (:row, :c, :m, :t)"
            ),
            {"row": int.from_bytes(digest) >> 1, "c": conversation, "m": message, "t": content},
        )


def _fold_search() -> None:
    """Make PostgreSQL's index of texts without accents, as SQLite's is."""
    op.execute("ALTER TABLE message_search DROP COLUMN words")
    op.execute("ALTER TABLE message_search ADD COLUMN folded TEXT NOT NULL DEFAULT ''")
    bind = op.get_bind()
    rows = bind.execute(sa.text("SELECT ctid::text, text FROM message_search")).all()
    for place, content in rows:
        plain = unicodedata.normalize("NFKD", content.casefold())
        folded = "".join(char for char in plain if not unicodedata.combining(char))
        bind.execute(
            sa.text("UPDATE message_search SET folded = :folded WHERE ctid = CAST(:place AS tid)"),
            {"folded": folded, "place": place},
        )
    op.execute(
        "ALTER TABLE message_search ADD COLUMN words TSVECTOR "
        "GENERATED ALWAYS AS (to_tsvector('simple', folded)) STORED"
    )
    op.execute("CREATE INDEX ix_message_search_words ON message_search USING gin (words)")
