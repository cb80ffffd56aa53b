"""A clock that was ahead and was set back: what it wrote into the future holds nobody up for that long."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import ClassVar

import pytest
from plm_engine_core.control_plane import ControlPlane, Principal
from plm_engine_core.control_plane.errors import FencingLost, NotFound
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import BudgetScope, Period
from plm_engine_core.testing.clock import FakeClock

pytestmark = pytest.mark.every_storage

YEARS = 12 * 365 * 86_400.0
OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets"}))
SHIFTED = "UPDATE budgets SET starts_at = starts_at + make_interval(days => %s) WHERE period = 'day'"


async def test_a_lease_of_a_resource_is_anybodys(bench):
    plane, asked = bench.control_plane, {"owner": "one", "seconds": 60, "by": bench.requester}
    late = await plane.acquire_lease(bench.tenant, "press", **asked)
    assert await plane.acquire_lease(bench.tenant, "press", **asked) is None
    bench.behind.set_time("resource_leases", "expires_at", YEARS, {"tenant_id": bench.tenant})
    lease = await plane.acquire_lease(bench.tenant, "press", **asked)
    assert lease.fencing_token > late.fencing_token
    with pytest.raises(FencingLost):
        await plane.require_lease(late)


class Windows:
    """Budgets of a day whose windows a test moves."""

    LIMIT: ClassVar = {"scope": "agent", "per": "day", "unit": "calls", "limit": 5}
    KEY = BudgetKey.of(BudgetScope.AGENT, "test", "calls", Period.DAY)

    def __init__(self, bench, make_policy, registry, *, in_memory):
        self._clock = FakeClock(datetime.now(UTC)) if in_memory else None
        storage = MemoryStorage(clock=self._clock) if self._clock else bench.storage
        plane = ControlPlane(policy=make_policy(limits=[self.LIMIT]), registry=registry, storage=storage)
        tenant = storage.add_tenant(bench.tenant) if self._clock else bench.tenant
        self.bench = replace(bench, control_plane=plane, tenant=tenant)

    def go(self, days):
        """Let the clock jump by days, back with fewer than 0."""
        if self._clock:
            self._clock.move(days * 86_400)
            return
        for shift in (-days - 10_000, 10_000):  # past each other: no key is there twice, not even for a moment
            self.bench.sql(
                "UPDATE budgets SET starts_at = starts_at + %s * interval '1 day' WHERE period = 'day'", shift
            )

    async def set(self, limit):
        await self.bench.control_plane.set_budget(self.bench.tenant, self.KEY, Decimal(limit), by=OPERATOR)

    async def correct(self, command_id):
        said = {"reason": "by hand", "command_id": command_id, "by": OPERATOR}
        return await self.bench.control_plane.correct_budget(self.bench.tenant, self.KEY, Decimal(2), **said)


@pytest.fixture
def windows(bench, make_policy, registry, storage_kind):
    return Windows(bench, make_policy, registry, in_memory=storage_kind == "memory")


async def test_a_correction_that_is_sent_again_in_a_later_window_answers_how_its_own_stands(windows, storage_kind):
    bench = windows.bench
    lease = await bench.lease()
    await bench.settle(await bench.begun(lease), lease)
    assert (await windows.correct("c")).spent == 3
    windows.go(1)
    if storage_kind == "postgres":  # what the record names is the window as it was
        bench.sql(
            "UPDATE idempotency_records SET result = jsonb_set(result, '{starts_at}', "
            "to_jsonb((result ->> 'starts_at')::timestamptz - interval '1 day')) WHERE operation = 'budgets.correct'"
        )
    with pytest.raises(NotFound):
        await windows.correct("d")
    assert (await windows.correct("c")).spent == 3
