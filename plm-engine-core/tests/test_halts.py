"""Halts: after one is committed nothing new starts in its scope, until it is lifted."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from plm_engine_core.control_plane import Granted
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import HaltScope, Reason, RunState

pytestmark = pytest.mark.every_storage


async def park(bench, run=None):
    """Drive a run into the standing halt, as a run worker would."""
    lease = await bench.lease(run)
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert denied.reason is Reason.HALTED
    left = await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w", reason="halted"
    )
    return lease.run, left


async def lift(bench, halt):
    return await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)


@pytest.mark.parametrize("scope", list(HaltScope))
async def test_a_halt_parks_its_runs_and_lifting_it_queues_them_in_the_same_commit(bench, scope):
    run = await bench.run()
    halt = await bench.halt(scope, run.id if scope is HaltScope.RUN else None)
    _, left = await park(bench, run)
    assert left is RunState.HALTED
    before = bench.deliveries(run)
    lifted = await lift(bench, halt)
    assert lifted.lifted_by == bench.approver.user_id
    assert await bench.state(run) is RunState.QUEUED
    assert bench.deliveries(run) == before + 1
    assert (await bench.kinds(run))[-2:] == ["run_parked", "run_resumed"]
    assert await lift(bench, halt) == lifted
    assert bench.deliveries(run) == before + 1
    lease = await bench.lease(run)
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease, attempt=2)), Granted)


async def test_a_run_under_two_halts_goes_on_after_the_second_is_lifted(bench):
    run = await bench.run()
    one, two = await bench.halt(HaltScope.RUN, run.id), await bench.halt(HaltScope.TENANT)
    await park(bench, run)
    await lift(bench, one)
    assert await bench.state(run) is RunState.HALTED
    await lift(bench, two)
    assert await bench.state(run) is RunState.QUEUED


async def test_two_lifts_at_once_do_not_leave_a_run_behind(bench):
    for _ in range(5):
        run = await bench.run()
        halts = [await bench.halt(HaltScope.RUN, run.id), await bench.halt(HaltScope.TENANT)]
        await park(bench, run)
        await asyncio.gather(*(lift(bench, halt) for halt in halts))
        assert await bench.state(run) is RunState.QUEUED


async def test_a_halt_lifted_before_the_run_was_parked_does_not_park_it(bench):
    halt = await bench.halt(HaltScope.TENANT)
    lease = await bench.lease()
    await bench.control_plane.admit(bench.proposal(lease))
    await lift(bench, halt)
    before = bench.deliveries(lease.run)
    left = await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w"
    )
    assert left is await bench.state(lease.run) is RunState.QUEUED
    assert bench.deliveries(lease.run) == before + 1


async def test_parking_and_lifting_at_once_never_leave_a_run_parked_without_a_halt(bench):
    for _ in range(25):
        halt = await bench.halt(HaltScope.TENANT)
        lease = await bench.lease()
        parking = bench.control_plane.finish(
            lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w"
        )
        await asyncio.gather(parking, lift(bench, halt))
        assert await bench.state(lease.run) is RunState.QUEUED


async def test_runs_of_other_tenants_come_back_from_a_system_halt_by_recovery(bench):
    neighbour = bench.other()
    halt = await bench.halt(HaltScope.SYSTEM)
    run, _ = await park(neighbour)
    await lift(bench, halt)
    assert await neighbour.state(run) is RunState.HALTED
    assert await Recovery(bench.storage).sweep() == 1
    assert await neighbour.state(run) is RunState.QUEUED
    assert (await neighbour.kinds(run))[-1] == "run_resumed"


async def test_halting_twice_answers_the_halt_that_stands(bench):
    first = await bench.halt(HaltScope.TENANT, reason="one")
    assert await bench.halt(HaltScope.TENANT, reason="two") == first
    many = await asyncio.gather(*(bench.halt(HaltScope.SYSTEM) for _ in range(8)))
    assert len({halt.id for halt in many}) == 1


async def test_each_halt_of_a_scope_has_a_higher_epoch(bench):
    epochs = []
    for _ in range(3):
        halt = await bench.halt(HaltScope.TENANT)
        epochs.append(halt.epoch)
        await lift(bench, halt)
    assert epochs == sorted(set(epochs))


async def test_a_halt_elsewhere_does_not_matter(bench):
    other = bench.behind.new_tenant()
    await bench.in_tenant(other).halt(HaltScope.TENANT)
    await bench.halt(HaltScope.RUN, (await bench.run()).id)
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)


async def test_no_grant_and_no_begin_is_committed_after_a_committed_halt(bench):
    """Eight admit and begin without pause while a halt is committed; then the database's own times are looked at."""
    bench = bench.with_policy(budgets={"run": {"EUR": 999, "calls": 999}, "tenant": {"EUR": 999, "calls": 999}})
    leases = [await bench.lease() for _ in range(8)]
    warm, halted = asyncio.Event(), asyncio.Event()
    after_halt = []

    async def admitter(lease):
        for index in range(500):
            known = halted.is_set()
            admission = await bench.control_plane.admit(bench.proposal(lease, step_index=index, step_id=f"s{index}"))
            if isinstance(admission, Granted):
                begun = await bench.begin(admission.grant, lease)
                after_halt.append(known)
                if begun.accepted:
                    await bench.settle(admission.grant, lease)
            else:
                assert admission.reason is Reason.HALTED
                return
            if index == 2:
                warm.set()
        raise AssertionError("the halt was never seen")

    async def halter():
        await warm.wait()
        await bench.halt(HaltScope.TENANT)
        halted.set()

    await asyncio.gather(halter(), *(admitter(lease) for lease in leases))
    assert True not in after_halt
    (halt,) = bench.behind.rows("halts")
    grants = bench.behind.rows("grants")
    assert max(grant["issued_at"] for grant in grants) < halt["triggered_at"]
    assert max(grant["begun_at"] for grant in grants if grant["begun_at"]) < halt["triggered_at"]


@pytest.mark.postgres_only
async def test_a_halt_waits_for_an_admission_that_is_not_committed_yet(bench):
    lease = await bench.lease()
    async with bench.control_plane.storage.admission._gateway.transaction(bench.tenant) as connection:
        await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        halting = asyncio.create_task(bench.halt(HaltScope.TENANT))
        done, _ = await asyncio.wait({halting}, timeout=0.3)  # a bound on how long a wrong halt would go unnoticed
        assert not done
        assert bench.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == [(1,)]
    await halting


@pytest.mark.parametrize(
    ("scope", "scopes", "missing"),
    [
        (HaltScope.TENANT, set(), "plm.halt"),
        (HaltScope.TENANT, {"plm.halt.system"}, "plm.halt"),
        (HaltScope.SYSTEM, {"plm.halt"}, "plm.halt.system"),
    ],
)
async def test_halting_and_lifting_need_the_scope_of_the_halt(bench, scope, scopes, missing):
    weak = replace(bench.approver, scopes=frozenset(scopes))
    with pytest.raises(Forbidden) as caught:
        await bench.control_plane.halt(bench.tenant, scope, None, reason="x", by=weak)
    assert caught.value.missing_scopes == (missing,)
    halt = await bench.halt(scope)
    with pytest.raises(Forbidden):
        await bench.control_plane.lift(bench.tenant, halt.id, by=weak)
    assert isinstance(halt.epoch, int)


async def test_a_halt_needs_a_reason_and_a_run_of_this_tenant(bench):
    with pytest.raises(InvalidRequest, match="needs a reason"):
        await bench.halt(HaltScope.TENANT, reason="  ")
    for scope, target in ((HaltScope.RUN, None), (HaltScope.TENANT, new_id()), (HaltScope.SYSTEM, new_id())):
        with pytest.raises(InvalidRequest, match="scope_id"):
            await bench.halt(scope, target)
    other = bench.behind.new_tenant()
    run = await bench.run()
    with pytest.raises(NotFound):
        await bench.in_tenant(other).halt(HaltScope.RUN, run.id)
    halt = await bench.halt(HaltScope.RUN, run.id)
    with pytest.raises(NotFound):
        await lift(bench.in_tenant(other), halt)


async def test_halts_are_events_of_the_tenant(bench):
    await lift(bench, await bench.halt(HaltScope.TENANT, reason="smoke"))
    events = await bench.storage.events.read(bench.tenant, "tenant")
    assert [event.kind for event in events] == ["halt_triggered", "halt_lifted"]
    assert events[0].data["reason"] == "smoke"
