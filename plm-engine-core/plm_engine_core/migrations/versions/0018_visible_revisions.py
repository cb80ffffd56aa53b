"""The application may read at which revision the database stands: it must not serve on a schema it does not know."""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_TABLES = "alembic_version_plm_shared, alembic_version_plm_engine_core"
_GRANT = f"GRANT SELECT ON {_TABLES} TO plm_engine_writer"
_REVOKE = f"REVOKE SELECT ON {_TABLES} FROM plm_engine_writer"  # noqa: S608  # names of ours, no input


def upgrade() -> None:
    op.execute(_GRANT)


def downgrade() -> None:
    op.execute(_REVOKE)
