"""The audit log, tokens that were used, clients that were revoked; a run has its operator's signature."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),  # from 1, without a gap
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "nonces",
        sa.Column("nonce", sa.String(64), primary_key=True),
        sa.Column("expires", sa.Float(53), nullable=False),
    )
    op.create_table(
        "revoked",
        sa.Column("client", sa.String(80), primary_key=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.add_column("runs", sa.Column("signature", sa.LargeBinary, nullable=True))
    op.add_column("runs", sa.Column("certificate", sa.LargeBinary, nullable=True))
    op.add_column("runs", sa.Column("operator", sa.String(64), nullable=True))


def downgrade() -> None:
    for column in ("operator", "certificate", "signature"):
        op.drop_column("runs", column)
    for table in ("revoked", "nonces", "audit"):
        op.drop_table(table)
