"""What a report counts for, and what it asked for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    for name in ("norm", "statistics_norm", "counted"):
        op.add_column("reports", sa.Column(name, sa.Float(), nullable=True))
    lowered = sa.Column("lowered", sa.Integer(), nullable=False, server_default="0")
    op.add_column("devices", lowered)
    op.add_column("devices", sa.Column("lowered_round", sa.Integer(), nullable=True))
    op.add_column("devices", sa.Column("lowered_share", sa.Float(), nullable=True))
