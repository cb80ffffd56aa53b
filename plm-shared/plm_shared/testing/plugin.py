"""The pytest plugin: a PostgreSQL per test run, a migrated database per test.

``kernel_database`` is a copy of a database with revisions 0001 to 0012. The server's major version is the newest at
hand, or the one named by ``PLM_TEST_PG_MAJOR`` or the ini option ``plm_pg_major``. Tests marked ``every_postgres`` run
once on 16, on 18 and on each other supported major that is installed; a missing 16 or 18 fails them, it never skips.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plm_shared.addresses import DatabaseUrls
    from plm_shared.embedded_postgres import EmbeddedPostgres
    from plm_shared.testing.clock import FrozenClock
    from plm_shared.testing.databases import ClusterPool, TemplateDatabases
    from plm_shared.testing.memory import InMemoryKernelEmitter

_ALWAYS = {16, 18}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the ini option."""
    parser.addini("plm_pg_major", "major version of the test server; default: the newest found", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "every_postgres: run on each supported PostgreSQL major that is at hand")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply marked tests by the majors."""
    marked = metafunc.definition.get_closest_marker("every_postgres")
    if marked is not None and "postgres_cluster" in metafunc.fixturenames:
        majors = _majors(metafunc.config)
        metafunc.parametrize(
            "postgres_cluster", majors, ids=[f"pg{major}" for major in majors], indirect=True, scope="session"
        )


@pytest.fixture(scope="session")
def postgres_clusters() -> Iterator[ClusterPool]:
    """The clusters of this run; they are removed at its end."""
    from plm_shared.testing.databases import ClusterPool

    pool = ClusterPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def postgres_cluster(request: pytest.FixtureRequest, postgres_clusters: ClusterPool) -> EmbeddedPostgres:
    """A running server of the chosen major version."""
    return postgres_clusters.cluster(getattr(request, "param", _chosen_major(request.config)))


@pytest.fixture(scope="session")
def template_databases(postgres_cluster: EmbeddedPostgres, postgres_clusters: ClusterPool) -> TemplateDatabases:
    """Templates on ``postgres_cluster``; other packages prepare theirs here."""
    return postgres_clusters.templates_of(postgres_cluster)


@pytest.fixture
def kernel_database(template_databases: TemplateDatabases) -> Iterator[DatabaseUrls]:
    """A database of its own for this test, with plm-shared's schema."""
    from plm_shared import migrations

    template = template_databases.template("plm_shared", lambda urls: migrations.upgrade(urls.owner))
    with template_databases.cloned(template) as database:
        yield database


@pytest.fixture
def two_tenants(kernel_database: DatabaseUrls) -> tuple[uuid.UUID, uuid.UUID]:
    """Two tenants in ``kernel_database``."""
    from plm_shared.testing.databases import create_tenants

    first, second = create_tenants(kernel_database, "first", "second")
    return first, second


@pytest.fixture
def second_tenant(two_tenants: tuple[uuid.UUID, uuid.UUID]) -> uuid.UUID:
    """The tenant that must never see what the first one writes."""
    return two_tenants[1]


@pytest.fixture
def frozen_clock() -> FrozenClock:
    """A clock that stands at 2030-01-01 until the test moves it."""
    from plm_shared.testing.clock import FrozenClock

    return FrozenClock()


@pytest.fixture
def memory_emitter(frozen_clock: FrozenClock) -> InMemoryKernelEmitter:
    """An emitter without a database, for a tenant of its own; ``memory_emitter.rows`` shows what was written."""
    from plm_shared.testing.memory import InMemoryKernelEmitter

    return InMemoryKernelEmitter(uuid.uuid4(), clock=frozen_clock.today)


def _chosen_major(config: pytest.Config) -> int | None:
    text = os.environ.get("PLM_TEST_PG_MAJOR") or str(config.getini("plm_pg_major"))
    return int(text) if text else None


def _majors(config: pytest.Config) -> list[int]:
    chosen = _chosen_major(config)
    if chosen is not None:
        return [chosen]
    from plm_shared.embedded_postgres import find_servers

    return sorted(_ALWAYS | {server.major for server in find_servers()})
