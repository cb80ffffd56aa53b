"""What was spent has room for every settlement.

A call that was made has cost what it has cost, whatever the limit was: its settlement must not fail because the sum has
more digits than a limit. PostgreSQL widens the column in place; no row is written.

Revision ID: 0040
Revises: 0039
"""

from __future__ import annotations

from alembic import op

revision = "0040"
down_revision = "0039"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE budgets ALTER COLUMN spent TYPE numeric(28, 8)")


def downgrade() -> None:
    op.execute("ALTER TABLE budgets ALTER COLUMN spent TYPE numeric(20, 8)")
