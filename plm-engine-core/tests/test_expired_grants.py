"""Grants that run out unused: what they hold comes back while their run goes on, and what began is left alone."""

from __future__ import annotations

import asyncio
import os

import psycopg
import pytest
from plm_engine_core.control_plane.errors import Conflict, IdempotencyConflict
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    OutcomeStatus,
    Reason,
    RunState,
    StepState,
)

pytestmark = pytest.mark.every_storage

SOAK = float(os.environ.get("SOAK", "0.05"))
RACES = max(40, int(400 * SOAK))


def let_expire(bench, grant, seconds=-1.0):
    """Move the end of a grant, into the past when left out."""
    bench.behind.set_time("grants", "expires_at", seconds, {"id": grant.id})


async def renewed(bench, lease):
    """The holder is there, and says so."""
    renew = bench.storage.runs.renew
    assert (await renew(bench.tenant, lease.run.id, fencing_token=lease.fencing_token, seconds=600)).held


async def calls(bench, lease):
    """The calls that the tenant has spent and reserved."""
    return await bench.budget(lease.run, "tenant", BudgetUnit.CALLS)


async def begin(bench, grant, lease):
    return await bench.control_plane.begin(grant, fencing_token=lease.fencing_token, actor="worker:w")


async def settlements(bench, lease):
    """Who settled calls of a run."""
    events = await bench.storage.events.read(bench.tenant, f"run/{lease.run.id}")
    return [event.actor for event in events if event.kind == "step_settled"]


async def test_what_a_grant_holds_that_ran_out_unused_comes_back_while_its_run_is_held(bench):
    lease = await bench.lease()
    grant = await bench.grant(lease)
    await renewed(bench, lease)
    await Recovery(bench.storage).sweep()
    assert await calls(bench, lease) == (0, 1), "it has time left"
    let_expire(bench, grant)
    await renewed(bench, lease)  # which makes no grant last longer
    await Recovery(bench.storage).sweep()
    assert await calls(bench, lease) == (0, 0)
    assert await bench.state(lease.run) is RunState.RUNNING
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert (step.state, step.error["category"]) == (StepState.NOT_STARTED, Reason.GRANT_EXPIRED)
    assert await settlements(bench, lease) == ["system:recovery"]


async def test_its_holder_goes_on_as_if_it_had_said_so_itself(bench):
    lease = await bench.lease()
    grant = await bench.grant(lease)
    let_expire(bench, grant)
    await Recovery(bench.storage).sweep()
    for _ in range(2):
        begun = await begin(bench, grant, lease)
        assert (begun.accepted, begun.reason) == (False, Reason.GRANT_EXPIRED)
        settled = await bench.settle(grant, lease, OutcomeStatus.NOT_STARTED)
        assert (settled.status, settled.spent["calls"]) == (OutcomeStatus.NOT_STARTED, "0")
    with pytest.raises((IdempotencyConflict, Conflict)):
        await bench.settle(grant, lease, OutcomeStatus.SUCCEEDED)
    assert await settlements(bench, lease) == ["system:recovery"]
    again = await bench.grant(lease, attempt=2)
    assert (await begin(bench, again, lease)).accepted
    await bench.settle(again, lease)
    assert await calls(bench, lease) == (1, 0)


async def test_a_call_that_began_is_left_to_its_holder(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    let_expire(bench, grant)
    await Recovery(bench.storage).sweep()
    assert await bench.storage.runs.expired(10) == []
    assert await calls(bench, lease) == (0, 1)
    assert (await bench.settle(grant, lease)).spent["calls"] == "1"


async def test_of_several_grants_only_those_that_ran_out_are_closed(bench):
    lease = await bench.lease()
    grants = [await bench.grant(lease, step_index=step) for step in range(3)]
    let_expire(bench, grants[1])
    await Recovery(bench.storage).sweep()
    assert await calls(bench, lease) == (0, 2)
    for grant in (grants[0], grants[2]):
        assert (await begin(bench, grant, lease)).accepted


async def test_what_a_halt_revoked_comes_back_once_its_time_is_over(bench):
    lease = await bench.lease()
    grant = await bench.grant(lease)
    await bench.halt(HaltScope.RUN, lease.run.id)
    let_expire(bench, grant)
    await Recovery(bench.storage).sweep()
    assert await calls(bench, lease) == (0, 0)
    refused = await begin(bench, grant, lease)
    assert (refused.accepted, refused.reason) == (False, Reason.HALTED)


async def test_a_run_that_is_parked_keeps_what_it_holds_until_it_goes_on(bench):
    lease = await bench.lease()
    unknown, unused = await bench.begun(lease), await bench.grant(lease, step_index=1)
    await bench.settle(unknown, lease, OutcomeStatus.OUTCOME_UNKNOWN)
    let_expire(bench, unused)
    await Recovery(bench.storage).sweep()
    assert await bench.state(lease.run) is RunState.OUTCOME_UNKNOWN
    assert await calls(bench, lease) == (1, 1)


async def test_many_sweepers_close_each_grant_once_and_see_only_ids_of_others(bench):
    other = bench.other()
    leases = [(each, await each.lease()) for each in (bench, other, bench, other)]
    for each, lease in leases:
        let_expire(bench, await each.grant(lease))
    found = await bench.storage.runs.expired(10)
    assert {run_id for _, run_id in found} == {lease.run.id for _, lease in leases}
    assert len(await bench.storage.runs.expired(1)) == 1
    await asyncio.gather(*(Recovery(bench.storage).sweep() for _ in range(5)))
    for each, lease in leases:
        assert await calls(each, lease) == (0, 0)
        assert await settlements(each, lease) == ["system:recovery"]


async def test_a_grant_that_cannot_be_closed_holds_up_no_other(bench, monkeypatch, caplog):
    damaged, whole = await bench.lease(), await bench.lease()
    for lease in (damaged, whole):
        let_expire(bench, await bench.grant(lease))
    expire = bench.storage.admission.expire

    async def failing(command):
        if command.run_id == damaged.run.id:
            raise RuntimeError("damaged")
        return await expire(command)

    monkeypatch.setattr(bench.storage.admission, "expire", failing)
    await Recovery(bench.storage).sweep()
    assert await calls(bench, whole) == (0, 1)
    assert "could not be given back yet" in caplog.text
    monkeypatch.undo()
    await Recovery(bench.storage).sweep()
    assert await calls(bench, whole) == (0, 0)


@pytest.mark.postgres_only
async def test_of_a_begin_and_a_sweep_at_the_same_moment_exactly_one_wins(bench):
    """Grants end while they are begun and swept over many connections; none is both, and none is neither."""
    async with open_pool(bench.database.app, max_size=8) as pool:
        storage = PostgresStorage(pool, bench.storage.runs._delivery)
        began = expired = 0
        for number in range(RACES):
            lease = await bench.lease()
            grant = await bench.grant(lease)
            let_expire(bench, grant, number % 10 * 0.002)

            async def sweeping(run_id=lease.run.id):
                while (await storage.runs.steps(bench.tenant, run_id))[0].state is StepState.GRANTED:
                    await Recovery(storage).sweep()

            begun, *_ = await asyncio.gather(
                storage.admission.begin(grant, fencing_token=lease.fencing_token, actor="worker:w"),
                sweeping(),
                sweeping(),
            )
            (step,) = await storage.runs.steps(bench.tenant, lease.run.id)
            if begun["status"] == "begun":
                began += 1
                assert step.state is StepState.RUNNING
                assert await settlements(bench, lease) == []
                assert (await bench.settle(grant, lease)).spent["calls"] == "1"
            else:
                expired += 1
                assert (begun["reason"], step.state) == (Reason.GRANT_EXPIRED, StepState.NOT_STARTED)
                assert await settlements(bench, lease) == ["system:recovery"]
        assert await calls(bench, lease) == (began, 0)
        assert began, "some were begun in time"
        assert expired, "some ran out"


@pytest.mark.postgres_only
async def test_a_begin_that_commits_after_the_end_of_its_grant_has_begun(bench):
    """The sweep found the grant unused and over, and waits for the run; meanwhile the call has left."""
    lease = await bench.lease()
    grant = await bench.grant(lease)
    let_expire(bench, grant, 0.5)
    async with await psycopg.AsyncConnection.connect(bench.database.app) as holder:
        begin = "SELECT engine_begin_v5(%s, %s, 0, 1, %s, %s, 'worker:w') ->> 'status'"
        cursor = await holder.execute(begin, [bench.tenant, lease.run.id, grant.id, lease.fencing_token])
        assert await cursor.fetchone() == ("begun",)
        async with asyncio.timeout(60):
            while not await bench.storage.runs.expired(1):  # noqa: ASYNC110  # the database's clock goes on by itself
                await asyncio.sleep(0)
            sweep = asyncio.create_task(Recovery(bench.storage).sweep())
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'engine_expire_v1'"
            )
            while bench.sql(waiting) == [(0,)]:  # noqa: ASYNC110  # only the database knows
                await asyncio.sleep(0)
        await holder.commit()
        await sweep
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert step.state is StepState.RUNNING
    assert await calls(bench, lease) == (0, 1)
    assert (await bench.settle(grant, lease)).spent["calls"] == "1"
