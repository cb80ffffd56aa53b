"""A clock that was ahead and was set back: what it wrote into the future holds nobody up for that long."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import ClassVar

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Principal
from plm_engine_core.control_plane.errors import FencingLost, NotFound
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import (
    BudgetScope,
    BudgetUnit,
    OutcomeStatus,
    Period,
    Reason,
    RunKind,
    RunState,
)
from plm_engine_core.testing.clock import FakeClock

pytestmark = pytest.mark.every_storage

YEARS = 12 * 365 * 86_400.0
LONGEST = 60.0  # seconds that anything here may take on a loaded machine
OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets"}))
SHIFTED = "UPDATE budgets SET starts_at = starts_at + make_interval(days => %s) WHERE period = 'day'"
KINDS = pytest.mark.parametrize("kind", [RunKind.HOSTED, RunKind.EXTERNAL])


async def taken(bench, kind=RunKind.HOSTED, run=None):
    """The lease of a run, of one minute."""
    run = run or await bench.run(kind=kind)
    lease = await bench.storage.runs.take(bench.tenant, run.id, owner="host", seconds=60, kind=kind)
    assert lease is not None
    return lease


def ahead(bench, run, *columns, seconds=YEARS):
    """Let a clock that far ahead have written these times of a run."""
    for column in columns:
        more = 60 if column == "lease_expires_at" else 0
        bench.behind.set_time("run_states", column, seconds + more, {"run_id": run.id})


async def set_right(bench, run):
    """Sweep, and let the lease that is left run out; answers how many drive jobs the sweep after that enqueued."""
    recovery = Recovery(bench.storage)
    assert await recovery.sweep() == 0
    (row,) = [each for each in bench.behind.rows("run_states") if each["run_id"] == run.id]
    now = await bench.storage.runs.now()
    assert row["updated_at"] <= now
    bench.touched(run.id, 3600)
    if row["state"] == "running":
        assert (row["lease_expires_at"] - now).total_seconds() <= 86_400
        bench.let_lease_expire(run)
    return await recovery.sweep()


async def test_a_rate_gives_tokens_again_as_soon_as_one_was_refused(bench):
    bench = bench.with_policy(rate_limit={"per_second": 1000, "burst": 1})
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)
    bench.behind.set_time("rate_buckets", "updated_at", YEARS, {})
    denied = await bench.control_plane.admit(bench.proposal(lease, step_index=1))
    assert isinstance(denied, Denied)
    assert denied.reason is Reason.RATE_LIMIT_EXCEEDED
    step, answer = 1, denied
    async with asyncio.timeout(LONGEST):
        while isinstance(answer, Denied):
            await asyncio.sleep(answer.retry_after_ms / 1000)
            step += 1
            answer = await bench.control_plane.admit(bench.proposal(lease, step_index=step))
    assert isinstance(answer, Granted)


async def test_a_rate_that_is_not_refused_gets_nothing_for_a_clock_that_was_set_back(bench):
    bench = bench.with_policy(rate_limit={"per_second": 1e-6, "burst": 2})
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)
    bench.behind.set_time("rate_buckets", "updated_at", 3600, {})
    answers = [await bench.control_plane.admit(bench.proposal(lease, step_index=step)) for step in (1, 2, 3)]
    assert [isinstance(each, Granted) for each in answers] == [True, False, False]


async def test_a_lost_job_is_enqueued_again(bench):
    run = await bench.run()
    ahead(bench, run, "updated_at")
    assert await set_right(bench, run) == 1
    assert bench.deliveries(run) == 2


@KINDS
@pytest.mark.parametrize(
    "columns", [("updated_at", "lease_expires_at"), ("lease_expires_at",)], ids=["taken", "renewed"]
)
async def test_what_a_dead_holder_held_comes_back(bench, kind, columns):
    lease = await taken(bench, kind)
    await bench.grant(lease)
    ahead(bench, lease.run, *columns)
    revived = await set_right(bench, lease.run)
    if kind is RunKind.HOSTED:
        assert revived == 1
    else:
        assert await bench.state(lease.run) is RunState.QUEUED
        assert await bench.budget(lease.run, "tenant", BudgetUnit.CALLS) == (0, 0)
    assert (await taken(bench, kind, lease.run)).fencing_token > lease.fencing_token


@KINDS
@pytest.mark.parametrize("renewed", [False, True])
async def test_a_live_holder_keeps_its_run(bench, kind, renewed):
    lease = await taken(bench, kind)
    grant = await bench.begun(lease)
    ahead(bench, lease.run, "updated_at", "lease_expires_at", seconds=3600)
    runs, held = bench.storage.runs, {"fencing_token": lease.fencing_token, "seconds": 60}
    if renewed:
        assert (await runs.renew(bench.tenant, lease.run.id, **held)).held
    await Recovery(bench.storage).sweep()
    assert (await runs.renew(bench.tenant, lease.run.id, **held)).held
    await Recovery(bench.storage).sweep()
    assert (await bench.settle(grant, lease)).status is OutcomeStatus.SUCCEEDED
    await bench.begun(lease, step_index=1)


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
            self.bench.sql(SHIFTED, shift)

    async def set(self, limit):
        await self.bench.control_plane.set_budget(self.bench.tenant, self.KEY, Decimal(limit), by=OPERATOR)

    async def correct(self, command_id):
        said = {"reason": "by hand", "command_id": command_id, "by": OPERATOR}
        return await self.bench.control_plane.correct_budget(self.bench.tenant, self.KEY, Decimal(2), **said)


@pytest.fixture
def windows(bench, make_policy, registry, storage_kind):
    return Windows(bench, make_policy, registry, in_memory=storage_kind == "memory")


async def test_a_limit_that_an_operator_sets_holds_for_later_windows_whatever_was_set_in_the_future(windows):
    windows.go(4000)
    await windows.set(9)
    windows.go(-4000)
    await windows.set(0)
    windows.go(1)
    bench = windows.bench
    denied = await bench.control_plane.admit(bench.proposal(await bench.lease()))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.limit["limit"]) == (Reason.BUDGET_EXCEEDED, "0")


async def test_a_limit_that_was_set_in_the_future_only_holds_still(windows):
    windows.go(4000)
    await windows.set(0)
    windows.go(-4000)
    bench = windows.bench
    denied = await bench.control_plane.admit(bench.proposal(await bench.lease()))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.limit["limit"]) == (Reason.BUDGET_EXCEEDED, "0")


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
