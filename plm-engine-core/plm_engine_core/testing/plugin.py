"""The pytest plugin: time to move, books in memory, and a migrated database of its own, for each test that asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plm_shared.addresses import DatabaseUrls
    from plm_shared.testing.databases import TemplateDatabases

    from plm_engine_core.control_plane.storage.memory import MemoryStorage
    from plm_engine_core.testing.clock import FakeClock


@pytest.fixture
def fake_clock() -> FakeClock:
    """The clock of `memory_storage`: it stands still until `move(seconds)`."""
    from plm_engine_core.testing.clock import FakeClock

    return FakeClock()


@pytest.fixture
def memory_storage(fake_clock: FakeClock) -> MemoryStorage:
    """Empty books in memory, by the fake clock. `Governor.in_memory` and `ControlPlane` take them."""
    from plm_engine_core.control_plane.storage.memory import MemoryStorage

    return MemoryStorage(clock=fake_clock)


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
