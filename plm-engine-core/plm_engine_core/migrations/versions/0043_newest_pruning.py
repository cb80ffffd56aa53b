"""The newest batches of a tenant's prunings are found without a look at all that ever were.

Each page of a feed asks for those that its reader does not know of, and stubs stay for ever.

Revision ID: 0043
Revises: 0042
"""

from __future__ import annotations

from alembic import op

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE INDEX ix_event_stubs_pruned ON event_stubs (tenant_id, pruned_in)")


def downgrade() -> None:
    op.execute("DROP INDEX ix_event_stubs_pruned")
