"""Alembic's entry."""

from __future__ import annotations

from plm_shared.migrations import VERSION_TABLE
from plm_shared.migrations.chain import run

run(version_table=VERSION_TABLE, lock=0x706C6D02)
