"""Why a device said that it cannot train in its run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("devices", sa.Column("left", sa.String(length=32), nullable=True))
