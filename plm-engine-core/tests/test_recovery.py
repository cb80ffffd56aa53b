"""Recovery: what nobody drives comes back, once, whoever looks."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.postgres import open_pool
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway
from plm_engine_core.control_plane.vocabulary import HaltScope, OutcomeStatus, RunState, TicketState

pytestmark = pytest.mark.every_storage


async def swept(bench, run):
    """How many jobs one sweep enqueued for this run."""
    before = bench.deliveries(run)
    await Recovery(bench.storage).sweep()
    return bench.deliveries(run) - before


async def test_a_dead_workers_run_comes_back_once_until_somebody_had_time_to_take_it(bench):
    lease = await bench.lease()
    assert await swept(bench, lease.run) == 0
    bench.let_lease_expire(lease.run)
    bench.touched(None, 60)
    assert [await swept(bench, lease.run) for _ in range(3)] == [1, 0, 0]
    bench.touched(lease.run.id, 3600)
    assert await swept(bench, lease.run) == 1
    assert (await bench.lease(lease.run)).fencing_token == lease.fencing_token + 1


@pytest.mark.postgres_only
async def test_a_process_that_is_paused_inside_a_transaction_does_not_keep_its_run(bench, engine_database):
    lease = await bench.lease()
    bench.let_lease_expire(lease.run)
    taken = []

    async def pause(pool):
        async with Gateway(pool).transaction(bench.tenant) as connection:
            await connection.execute("SELECT FROM run_states WHERE run_id = %s FOR UPDATE", [lease.run.id])
            taken.append(await bench.lease(lease.run))
            await connection.execute("SELECT 1")

    async with open_pool(engine_database.app, longest_idle=0.2) as pool:
        with pytest.raises(StorageUnavailable):
            await pause(pool)
    assert [found.fencing_token for found in taken] == [lease.fencing_token + 1]


async def test_a_lost_job_is_enqueued_again(bench):
    run = await bench.run()
    assert await swept(bench, run) == 0
    bench.touched(run.id, 3600)
    assert [await swept(bench, run) for _ in range(2)] == [1, 0]


async def test_an_expired_ticket_lets_its_run_go_on(bench):
    lease, pending = await bench.ask()
    assert await swept(bench, lease.run) == 0
    bench.let_deadline_pass(pending)
    assert await swept(bench, lease.run) == 1
    assert await bench.state(lease.run) is RunState.QUEUED
    assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).state is TicketState.EXPIRED


async def test_what_is_parked_rightly_or_over_is_left_alone(bench):
    lease = await bench.lease()
    await bench.settle(await bench.begun(lease), lease, OutcomeStatus.OUTCOME_UNKNOWN)
    halted = await bench.lease()
    await bench.halt(HaltScope.TENANT)
    await bench.control_plane.finish(
        halted.run, fencing_token=halted.fencing_token, state=RunState.HALTED, actor="worker:w"
    )
    cancelled = await bench.run()
    await bench.control_plane.cancel(bench.tenant, cancelled.id, by=bench.requester)
    bench.touched(None, 3600)
    assert await Recovery(bench.storage).sweep() == 0


async def test_four_sweepers_at_once_enqueue_each_run_once(bench):
    runs = [await bench.run() for _ in range(12)]
    asked = [await bench.ask() for _ in range(3)]
    for run in runs:
        bench.touched(run.id, 3600)
    for _, pending in asked:
        bench.let_deadline_pass(pending)
    everyone = [*runs, *(lease.run for lease, _ in asked)]
    before = [bench.deliveries(run) for run in everyone]
    counts = await asyncio.gather(*(Recovery(bench.storage).sweep() for _ in range(4)))
    assert sum(counts) == 15
    assert [bench.deliveries(run) - was for run, was in zip(everyone, before, strict=True)] == [1] * 15


async def test_how_long_a_job_may_be_on_its_way_is_up_to_the_operator(bench):
    run = await bench.run()
    bench.touched(run.id, 60)
    assert await Recovery(bench.storage, patience_seconds=120).sweep() == 0
    assert await Recovery(bench.storage, patience_seconds=50).sweep() == 1
    assert await Recovery(bench.storage, patience_seconds=50).sweep() == 0


async def test_it_looks_across_tenants_but_sees_only_ids(bench):
    other = bench.behind.new_tenant()
    runs = {(await each.run()).id for each in (bench, bench.in_tenant(other))}
    for run_id in runs:
        bench.touched(run_id, 3600)
    assert {run_id for _, run_id in await bench.storage.runs.abandoned(10, patience_seconds=30)} == runs
    assert len(await bench.storage.runs.abandoned(1, patience_seconds=30)) == 1


@pytest.mark.parametrize("error", [StorageUnavailable("locked"), psycopg.errors.RaiseException("damaged")], ids=str)
async def test_one_run_that_cannot_be_brought_back_does_not_hold_up_the_others(bench, monkeypatch, caplog, error):
    runs = [await bench.run() for _ in range(3)]
    for run in runs:
        bench.touched(run.id, 3600)
    revive = bench.storage.runs.revive

    async def failing(tenant_id, run_id, *, patience_seconds):
        if run_id == runs[0].id:
            raise error
        return await revive(tenant_id, run_id, patience_seconds=patience_seconds)

    monkeypatch.setattr(bench.storage.runs, "revive", failing)
    assert await Recovery(bench.storage).sweep() == 2
    assert "could not be brought back yet" in caplog.text


async def test_one_tenant_whose_halt_cannot_be_finished_does_not_hold_up_what_comes_after(bench, monkeypatch, caplog):
    lease, run = await bench.lease(), await bench.run()
    grant = await bench.grant(lease)
    other = bench.other()
    await bench.halt(HaltScope.RUN, lease.run.id)
    bench.behind.set_rows("grants", {"id": grant.id}, state="issued")  # as if the trigger had not come so far
    other_run = await other.run()
    bench.touched(run.id, 3600)
    bench.touched(other_run.id, 3600)

    async def failing(tenant_id):
        raise psycopg.errors.RaiseException("damaged")

    monkeypatch.setattr(bench.storage.halts, "end_halted", failing)
    assert await Recovery(bench.storage).sweep() == 2
    assert "a halt is not finished yet" in caplog.text


async def test_the_loop_outlives_a_failed_pass(bench, monkeypatch, caplog):
    passes = asyncio.Queue()

    async def abandoned(limit, *, patience_seconds):
        passes.put_nowait((limit, patience_seconds))
        raise RuntimeError("a defect")

    monkeypatch.setattr(bench.storage.runs, "abandoned", abandoned)
    task = asyncio.create_task(Recovery(bench.storage, every_seconds=0).run())
    for _ in range(3):
        await passes.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "the next one tries again" in caplog.text


async def test_one_cancel_ends_the_loop_even_where_the_database_was_just_given_up(bench, monkeypatch):
    """A driver may raise its connection's error in place of the cancel, and a task group passes no second one on."""
    under_way = asyncio.Event()

    async def abandoned(limit, *, patience_seconds):
        under_way.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StorageUnavailable("the connection was lost") from None

    monkeypatch.setattr(bench.storage.runs, "abandoned", abandoned)
    task = asyncio.create_task(Recovery(bench.storage, every_seconds=0).run())
    await under_way.wait()
    task.cancel()
    await asyncio.wait([task], timeout=10)
    assert task.cancelled()


@pytest.mark.parametrize(
    ("port", "look"), [("halts", "unfinished"), ("runs", "ahead"), ("runs", "orphaned"), ("runs", "expired")]
)
async def test_a_look_that_cannot_be_had_does_not_hold_up_what_the_others_find(bench, monkeypatch, caplog, port, look):
    async def failing(*_, **__):
        raise RuntimeError("no such look")

    run = await bench.run()
    bench.touched(run.id, 3600)
    monkeypatch.setattr(getattr(bench.storage, port), look, failing)
    assert await Recovery(bench.storage).sweep() == 1
    assert "a part of a recovery pass failed" in caplog.text


@pytest.mark.parametrize("field", ["every_seconds", "patience_seconds", "forsaken_seconds"])
@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -1, 1e12, "60", None])
async def test_a_time_that_nothing_could_be_found_by_is_refused_before_the_first_pass(bench, field, seconds):
    """PostgreSQL has no such time: each pass would fail at its first look, and bring nothing back."""
    with pytest.raises(InvalidRequest, match=field):
        Recovery(bench.storage, **{field: seconds})
