"""One server at a time has the database, by lease; an update names the round whose task it answers; a model, its file.

A run in the middle of a round asks for that round's updates again: their files lie in other places now.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

MODELS = sa.table("models", sa.column("version"), sa.column("file"))
UPDATES = sa.table("updates", sa.column("round"), sa.column("base"))


def upgrade() -> None:
    lease = op.create_table(
        "lease",
        sa.Column("number", sa.Integer, primary_key=True),  # there is one row
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("address", sa.String(255), nullable=False),
        sa.Column("term", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("store", sa.String(32), nullable=False),  # this database's own name, which its state folders bear too
    )
    nobody = {"holder": "", "host": "", "pid": 0, "address": "", "term": 0, "expires": 0.0}
    op.bulk_insert(lease, [{"number": 1, **nobody, "store": secrets.token_hex(16)}])
    op.add_column("updates", sa.Column("base", sa.Integer, nullable=False, server_default="0"))
    op.execute(UPDATES.update().values(base=UPDATES.c.round))
    op.add_column("models", sa.Column("file", sa.String(64), nullable=False, server_default=""))
    connection = op.get_bind()
    for version in connection.execute(sa.select(MODELS.c.version).distinct()).scalars().all():
        connection.execute(MODELS.update().where(MODELS.c.version == version).values(file=f"{version:06}.safetensors"))


def downgrade() -> None:
    # Models of later terms have another name than the older version looks for; it takes those without one.
    op.drop_column("models", "file")
    op.drop_column("updates", "base")
    op.drop_table("lease")
