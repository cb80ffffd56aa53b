"""What state machines beside an oracle share: a control plane over either storage, and a new tenant for each try."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from plm_engine_core.control_plane import ControlPlane, SyncControlPlane
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants

SOAK = float(os.environ.get("SOAK", "0.05"))
WIDE = {"EUR": "1000", "calls": "1000"}

Opened = ControlPlane | AbstractAsyncContextManager[ControlPlane]
NewTenant = Callable[[], uuid.UUID]
Lapse = Callable[[str, str, uuid.UUID], None]
"""Has the time in a column of the row of this id be over."""

Machine = Callable[[SyncControlPlane, uuid.UUID], RuleBasedStateMachine]
LapsingMachine = Callable[[SyncControlPlane, uuid.UUID, Lapse], RuleBasedStateMachine]
NeighbourlyMachine = Callable[[SyncControlPlane, uuid.UUID, uuid.UUID, Lapse], RuleBasedStateMachine]
"""One that has a second tenant beside its own."""


class NoDelivery:
    """A machine moves its runs itself."""

    async def enqueue(
        self, connection: Any, tenant_id: uuid.UUID, run_id: uuid.UUID, *, after_seconds: float = 0.0
    ) -> None:
        """Deliver nothing."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every machine runs over each storage."""
    if "against_oracle" in metafunc.fixturenames:
        metafunc.parametrize("storage", ["postgres", "memory"])


@pytest.fixture
def against_oracle(
    storage: str, request: pytest.FixtureRequest, make_policy: Callable[..., Any], registry: CapabilityRegistry
) -> Callable[..., None]:
    """Plays a machine, under a policy whose limits are wide unless the machine is about them.

    One that is played in several `variants` has as many tries in all of them together.
    """

    def play(
        machine: Machine | LapsingMachine | NeighbourlyMachine,
        *,
        steps: int,
        budgets: dict[str, Any] | None = None,
        lapsing: bool = False,
        neighbourly: bool = False,
        variants: int = 1,
        **policy: Any,
    ) -> None:
        policy = make_policy(
            budgets=budgets or {"run": WIDE, "tenant": WIDE}, rate_limit={"per_second": 1e6, "burst": 1e6}, **policy
        )
        with opened(storage, request, policy, registry) as (plane, new_tenant, lapse):
            neighbour = (new_tenant(),) if neighbourly else ()
            more = (*neighbour, *((lapse,) if lapsing else ()))
            run_state_machine_as_test(
                lambda: machine(plane, new_tenant(), *more),
                settings=settings(
                    max_examples=max(26, int(100 * SOAK)) // variants,
                    stateful_step_count=steps,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )

    return play


@contextmanager
def opened(
    storage: str, request: pytest.FixtureRequest, policy: Any, registry: CapabilityRegistry
) -> Iterator[tuple[SyncControlPlane, NewTenant, Lapse]]:
    made = in_memory(policy, registry) if storage == "memory" else over_postgres(request, policy, registry)
    core, new_tenant, lapse = made
    with SyncControlPlane(core) as plane:
        yield plane, new_tenant, lapse


def in_memory(policy: Any, registry: CapabilityRegistry) -> tuple[Opened, NewTenant, Lapse]:
    memory = MemoryStorage()
    core = ControlPlane(policy=policy, registry=registry, storage=memory)

    def lapse(table: str, column: str, identifier: uuid.UUID) -> None:
        for rows in getattr(memory.books, table)._groups.values():
            if identifier in rows:
                rows[identifier] = {**rows[identifier], column: datetime.now(UTC) - timedelta(seconds=1)}

    return core, lambda: memory.add_tenant(uuid.uuid4()), lapse


def over_postgres(
    request: pytest.FixtureRequest, policy: Any, registry: CapabilityRegistry
) -> tuple[Opened, NewTenant, Lapse]:
    database: DatabaseUrls = request.getfixturevalue("engine_database")
    numbers = count()

    @asynccontextmanager
    async def core() -> AsyncIterator[ControlPlane]:
        async with open_pool(database.app, max_size=2) as pool:
            yield ControlPlane(policy=policy, registry=registry, storage=PostgresStorage(pool, NoDelivery()))

    def lapse(table: str, column: str, identifier: uuid.UUID) -> None:
        change = f"UPDATE {table} SET {column} = clock_timestamp() - interval '1 second' WHERE id = %s"  # noqa: S608  # names from these tests
        with psycopg.connect(database.admin, autocommit=True) as connection:
            connection.execute(change.encode(), [identifier])

    return core(), lambda: create_tenants(database, f"t{next(numbers)}")[0], lapse
