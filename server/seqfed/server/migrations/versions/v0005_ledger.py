"""The ledger of differential privacy: what each run has spent of each data holder, and of all of them together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ledger",
        sa.Column("run", sa.String(16), primary_key=True),
        sa.Column("holder", sa.String(80), primary_key=True),  # a client, or * for every one
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("releases", sa.Integer, nullable=False),
        sa.Column("unit", sa.String(16), nullable=False),
        sa.Column("epsilon", sa.Float(53), nullable=True),  # unknown here where each client keeps its own account
        sa.Column("delta", sa.Float(53), nullable=False),
        sa.Column("noise_multiplier", sa.Float(53), nullable=True),
        sa.Column("sampling", sa.Text, nullable=False),
        sa.Column("accountant", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("ledger")
