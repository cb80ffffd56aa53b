"""The pytest plugin: a database with plm-shared's and the engine's schema for each test that asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plm_shared.addresses import DatabaseUrls
    from plm_shared.testing.databases import TemplateDatabases


@pytest.fixture
def engine_database(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    """A database of its own for this test, with both schemas at their heads."""
    template = template_databases.template("plm_engine_core", _migrate)
    with template_databases.cloned(template) as database:
        yield database


def _migrate(database: DatabaseUrls) -> None:
    import plm_shared.migrations

    import plm_engine_core.migrations

    plm_shared.migrations.upgrade(database.owner)
    plm_engine_core.migrations.upgrade(database.owner)
