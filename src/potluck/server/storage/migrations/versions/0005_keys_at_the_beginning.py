"""The keys that the experiment file gave when a run was begun."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("runs", sa.Column("begun", sa.Text(), nullable=True))
