"""Medians beside means."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("ledger", sa.Column("median_loss", sa.Float(), nullable=True))
    op.add_column("evaluations", sa.Column("medians", sa.Text(), nullable=True))
