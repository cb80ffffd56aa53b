"""Every decision goes by the clock of the books, whatever this machine's clock says."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Pending
from plm_engine_core.control_plane.errors import Forbidden
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import Reason
from plm_engine_core.testing.clock import FakeClock

HOURS = 3600.0


@pytest.fixture
def clock():
    """The clock of the books, far from this machine's."""
    return FakeClock()


@pytest.fixture
def timed(bench, clock, make_policy, registry):
    """The bench over books in memory with that clock; at night, by UTC, everything is asked."""
    night = {"id": "night", "then": "ask", "when": {"type": "time_of_day", "start": "20:00", "end": "06:00"}}
    storage = MemoryStorage(clock=clock)
    plane = ControlPlane(policy=make_policy(rules=[night]), registry=registry, storage=storage)
    return replace(bench, control_plane=plane, tenant=storage.add_tenant(bench.tenant))


async def test_a_clock_that_jumps_moves_every_decision_with_it(timed, clock):
    """The clock starts at midnight."""
    asked = await timed.lease()
    assert isinstance(await timed.control_plane.admit(timed.proposal(asked)), Pending)
    clock.move(7 * HOURS)
    lease = await timed.lease(seconds=24 * HOURS)
    for_a_while = replace(timed.requester, expires_at=clock() + timedelta(minutes=30))

    async def answer(step):
        return await timed.control_plane.admit(timed.proposal(lease, principal=for_a_while, step_index=step))

    assert isinstance(await answer(0), Granted)
    clock.move(HOURS)
    late = await answer(1)
    assert isinstance(late, Denied)
    assert late.reason is Reason.DELEGATION_EXPIRED
    clock.move(-HOURS)
    assert isinstance(await answer(2), Granted)


async def test_the_facts_record_the_time_of_the_books(timed, clock):
    lease = await timed.lease()
    await timed.control_plane.admit(timed.proposal(lease))
    (step,) = await timed.storage.runs.steps(timed.tenant, lease.run.id)
    assert step.decision["facts"]["at"] == clock().isoformat()


async def test_a_run_is_created_for_nobody_whose_delegation_ended(timed, clock):
    until = replace(timed.requester, expires_at=clock() + timedelta(seconds=1))
    await timed.run(principal=until)
    clock.move(HOURS)
    with pytest.raises(Forbidden, match="delegation ended"):
        await timed.run(principal=until)
