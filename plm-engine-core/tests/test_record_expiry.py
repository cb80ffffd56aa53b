"""Idempotency records of ended runs expire; what they answered for is done no second time by that."""

from __future__ import annotations

import asyncio
import uuid
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core.control_plane import Granted, Principal
from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.record_expiry import KEEP_SECONDS
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import BudgetScope, BudgetUnit, RunState, TicketDecision

pytestmark = pytest.mark.every_storage

DAY = 86_400.0
OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets"}))
KEYED = {"idempotency_key": "k", "request_digest": "d"}


def records(bench):
    """How many there are, over all tenants."""
    return len(bench.behind.rows("idempotency_records"))


async def worked(bench, *, steps=1, **request):
    """The lease of a run with so many settled steps."""
    lease = await bench.lease(await bench.run(**request))
    for step in range(steps):
        await bench.settle(await bench.begun(lease, step_index=step), lease)
    return lease


async def end(bench, lease, *, days_ago, state=RunState.SUCCEEDED):
    """End a run that long ago."""
    held = {"fencing_token": lease.fencing_token, "actor": "test"}
    await bench.storage.runs.finish(bench.tenant, lease.run.id, state=state, **held)
    bench.behind.set_time("run_states", "finished_at", -days_ago * DAY, {"run_id": lease.run.id})


async def ended(bench, *, days_ago=31, state=RunState.SUCCEEDED, **work):
    """The lease of a run that ended that long ago."""
    lease = await worked(bench, **work)
    await end(bench, lease, days_ago=days_ago, state=state)
    return lease


async def correct(bench, amount=Decimal(-1), command_id="c"):
    key = BudgetKey(scope=BudgetScope.TENANT, scope_id=bench.tenant, unit="calls")
    told = {"reason": "x", "command_id": command_id, "by": OPERATOR}
    return await bench.control_plane.correct_budget(bench.tenant, key, amount, **told)


async def created(bench):
    """The run that the key answers with, asked for until there is an answer."""
    while True:
        try:
            return await bench.run(**KEYED)
        except StorageUnavailable:
            continue


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
async def test_those_of_a_run_go_a_while_after_it_ended(bench, state):
    await ended(bench, steps=3, state=state, **KEYED)
    assert records(bench) == 4
    assert await Recovery(bench.storage).sweep_records() == 4
    assert records(bench) == 0
    assert await Recovery(bench.storage).sweep_records() == 0


async def test_those_of_a_run_that_ended_lately_stay(bench):
    lease = await ended(bench, days_ago=29, **KEYED)
    bench.behind.set_time("run_states", "created_at", -400 * DAY, {"run_id": lease.run.id})
    assert await Recovery(bench.storage).sweep_records() == 0
    assert (await bench.run(**KEYED)).id == lease.run.id
    assert await Recovery(bench.storage, idempotency_seconds=28 * DAY).sweep_records() == 2


async def test_those_of_a_run_that_goes_on_stay_however_old_it_is(bench):
    running, (parked, pending) = await worked(bench, **KEYED), await bench.ask()
    for column in ("created_at", "updated_at"):
        bench.behind.set_time("run_states", column, -400 * DAY, {})
    assert await Recovery(bench.storage).sweep_records() == 0
    assert (await bench.run(**KEYED)).id == running.run.id
    assert (await bench.control_plane.admit(bench.proposal(parked, capability="thing.write"))) == pending


async def test_those_of_calls_that_waited_for_approval_go_with_the_others(bench):
    lease, pending = await bench.ask()
    await bench.decide(pending, TicketDecision.APPROVE)
    lease = await bench.lease(lease.run)
    approved = bench.proposal(lease, capability="thing.write", ticket_id=pending.ticket_id)
    admission = await bench.control_plane.admit(approved)
    assert isinstance(admission, Granted), admission
    await bench.begin(admission.grant, lease)
    await bench.settle(admission.grant, lease, capability_id="thing.write")
    await end(bench, lease, days_ago=31)
    assert records(bench) == 2
    assert await Recovery(bench.storage).sweep_records() == 2


async def test_an_admission_of_an_ended_run_is_made_no_second_time(bench):
    lease = await ended(bench)
    await Recovery(bench.storage).sweep_records()
    before = await bench.kinds(lease.run), await bench.budget(lease.run, "tenant", BudgetUnit.CALLS)
    for attempt in (1, 2):
        with pytest.raises(FencingLost):
            await bench.grant(lease, attempt=attempt)
    assert (await bench.kinds(lease.run), await bench.budget(lease.run, "tenant", BudgetUnit.CALLS)) == before
    assert records(bench) == 0


async def test_a_key_makes_a_new_run_after_it_expired_and_stands_for_that_one_then(bench):
    lease = await ended(bench, **KEYED)
    await Recovery(bench.storage).sweep_records()
    anew = await bench.run(**KEYED)
    assert anew.id != lease.run.id
    assert await Recovery(bench.storage).sweep_records() == 0
    assert (await bench.run(**KEYED)).id == anew.id


async def test_a_correction_is_booked_once_for_ever(bench):
    await ended(bench, steps=2)
    await correct(bench)
    if hasattr(bench.behind, "database"):
        bench.behind.set_time("idempotency_records", "created_at", -4000 * DAY, {})
    assert await Recovery(bench.storage).sweep_records() == 2
    assert records(bench) == 1
    assert (await correct(bench)).spent == 1


async def test_a_marker_answers_the_same_for_ever(bench):
    lease = await worked(bench)
    put = {"command_id": "m", "by": bench.requester}
    first = await bench.control_plane.mark(bench.tenant, lease.run.id, "here", **put)
    await end(bench, lease, days_ago=31)
    assert await Recovery(bench.storage).sweep_records() == 1
    assert await bench.control_plane.mark(bench.tenant, lease.run.id, "here", **put) == first


async def test_nothing_of_another_tenant_goes_with_them(bench):
    other = bench.other()
    await ended(bench, **KEYED)
    theirs = await worked(other, **KEYED)
    batch = await bench.storage.idempotency.expire(bench.tenant, keep_seconds=KEEP_SECONDS, limit=99)
    assert (batch.records, batch.more) == (2, False)
    assert (await other.run(**KEYED)).id == theirs.run.id
    assert records(bench) == 2


async def test_a_pass_takes_what_is_due_in_every_tenant(bench):
    for each in (bench, bench.other(), bench.other()):
        await ended(each, steps=2)
        await worked(each)
    assert await Recovery(bench.storage).sweep_records() == 6
    assert records(bench) == 3


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_what_is_more_than_a_batch_goes_batch_by_batch(bench, limit):
    for number in range(3):
        await ended(bench, steps=number, idempotency_key=str(number), request_digest="d", days_ago=40 - number)
    await ended(bench, steps=2, days_ago=2)
    sizes, more = [], True
    while more:
        batch = await bench.storage.idempotency.expire(bench.tenant, keep_seconds=KEEP_SECONDS, limit=limit)
        sizes.append(batch.records)
        more = batch.more
    assert sum(sizes) == 6
    assert max(sizes) <= limit
    assert records(bench) == 2


async def test_many_sweepers_at_once_take_each_record_once(bench):
    tenants = [bench, bench.other()]
    for each in tenants:
        for number in range(5):
            await ended(each, steps=2, idempotency_key=str(number), request_digest="d")
    live = await worked(bench)
    removed = await asyncio.gather(*(Recovery(bench.storage).sweep_records() for _ in range(8)))
    removed.append(await Recovery(bench.storage).sweep_records())
    assert sum(removed) == 30
    assert records(bench) == 1
    assert await bench.state(live.run) is RunState.RUNNING


async def test_a_key_that_is_sent_again_while_it_expires_makes_one_run_at_most(bench):
    for _ in range(5):
        lease = await worked(bench, **KEYED)
        await end(bench, lease, days_ago=31)
        before = len(bench.behind.rows("runs"))
        expiries = (Recovery(bench.storage, idempotency_seconds=KEEP_SECONDS).sweep_records() for _ in range(3))
        answers = await asyncio.gather(
            *(created(bench) for _ in range(4)), *expiries, *(created(bench) for _ in range(4))
        )
        answered = {run.id for run in (*answers[:4], *answers[-4:])}
        made = len(bench.behind.rows("runs")) - before
        assert made == len(answered - {lease.run.id})
        assert made <= 1
        (last,) = {(await bench.run(**KEYED)).id for _ in range(2)}
        await bench.storage.runs.request_cancel(bench.tenant, last, actor="test") if made else None
        bench.behind.set_time("run_states", "finished_at", -31 * DAY, {"run_id": last})
        await Recovery(bench.storage).sweep_records()


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 0, DAY - 1, 1e12, "60", None])
async def test_less_than_a_day_is_refused(bench, seconds):
    with pytest.raises(InvalidRequest, match="idempotency_seconds"):
        Recovery(bench.storage, idempotency_seconds=seconds)


async def test_one_tenant_whose_records_cannot_go_does_not_keep_the_others(bench, monkeypatch, caplog):
    other = bench.other()
    await ended(bench)
    await ended(other)
    expire = bench.storage.idempotency.expire

    async def failing(tenant_id, **options):
        if tenant_id == bench.tenant:
            raise RuntimeError("a damaged row")
        return await expire(tenant_id, **options)

    monkeypatch.setattr(bench.storage.idempotency, "expire", failing)
    assert await Recovery(bench.storage).sweep_records() == 1
    assert "stay until the next pass" in caplog.text


async def test_the_loop_takes_them_too(bench, monkeypatch):
    await ended(bench)
    passed = asyncio.Event()
    tenants = bench.storage.checkpoints.tenants

    async def seen():
        if not records(bench):
            passed.set()
        return await tenants()

    monkeypatch.setattr(bench.storage.checkpoints, "tenants", seen)
    task = asyncio.create_task(Recovery(bench.storage, records_every_seconds=0).run())
    await asyncio.wait_for(passed.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.postgres_only
async def test_it_waits_for_nobody_who_holds_a_run(bench):
    lease = await ended(bench)
    with psycopg.connect(bench.database.admin) as connection:
        connection.execute("SELECT FROM run_states WHERE run_id = %s FOR UPDATE", [lease.run.id])
        assert await Recovery(bench.storage).sweep_records() == 1


@pytest.mark.postgres_only
async def test_what_somebody_else_expires_just_now_is_left_to_that_one(bench):
    other = bench.other()
    await ended(bench)
    await ended(other)
    with psycopg.connect(bench.database.app) as connection:
        connection.execute("SELECT engine_expire_records_v1(%s, %s, 10)", [bench.tenant, KEEP_SECONDS])
        assert await Recovery(bench.storage).sweep_records() == 1
        assert records(bench) == 1
    assert records(bench) == 0


@pytest.mark.postgres_only
@pytest.mark.parametrize(("keep", "limit"), [(DAY - 1, 1), ("NaN", 0), (DAY, 0), (None, 1), (DAY, None)])
async def test_the_database_refuses_to_keep_them_for_less_than_a_day(bench, keep, limit):
    with psycopg.connect(bench.database.app) as app, pytest.raises(psycopg.errors.CheckViolation):
        app.execute("SELECT engine_expire_records_v1(%s, %s, %s)", [bench.tenant, keep, limit])


@pytest.mark.postgres_only
async def test_the_key_of_a_run_that_a_node_of_an_earlier_release_made_stands_for_ever(bench):
    lease = await ended(bench, **KEYED)
    bench.behind.set_rows("run_states", {"run_id": lease.run.id}, idempotency_key=None)
    assert await Recovery(bench.storage).sweep_records() == 1
    assert (await bench.run(**KEYED)).id == lease.run.id
