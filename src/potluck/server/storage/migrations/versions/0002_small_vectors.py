"""Small vectors in the rows that they belong to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("models", sa.Column("content", sa.LargeBinary(), nullable=True))
    op.add_column("reports", sa.Column("content", sa.LargeBinary(), nullable=True))
