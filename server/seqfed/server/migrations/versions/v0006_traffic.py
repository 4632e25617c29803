"""Runs keep what has moved in the round under way, by client, so that a restart does not lose it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("traffic", sa.Text, nullable=False, server_default="{}"))


def downgrade() -> None:
    op.drop_column("runs", "traffic")
