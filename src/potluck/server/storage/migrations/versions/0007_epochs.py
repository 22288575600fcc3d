"""The epoch of a run's manifests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("runs", sa.Column("epoch", sa.BigInteger(), nullable=False, server_default="0"))
