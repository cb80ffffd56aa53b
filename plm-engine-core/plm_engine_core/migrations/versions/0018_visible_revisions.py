"""The application may read at which revision the database stands: it must not serve on a schema it does not know."""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_TABLES = "alembic_version_plm_shared, alembic_version_plm_engine_core"


def upgrade() -> None:
    op.execute(f"GRANT SELECT ON {_TABLES} TO plm_engine_writer")


def downgrade() -> None:
    op.execute(f"REVOKE SELECT ON {_TABLES} FROM plm_engine_writer")
