"""A run as it was: what the tables said at any moment is told from the events alone later, in both storages."""

from __future__ import annotations

import sys
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core.control_plane.errors import Conflict, EventsPruned, InvalidRequest, NotFound
from plm_engine_core.control_plane.events import Archivist, Signer, open_archive, prune_events, run_stream
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.events.standing import BudgetStanding
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.vocabulary import BudgetScope, RunState, TicketDecision, TicketState

pytestmark = pytest.mark.every_storage

module = sys.modules["plm_engine_core.control_plane.events.as_of"]  # its name is that of its function, too


async def as_of(bench, run, moment):
    return await bench.control_plane.as_of(bench.tenant, run.id, moment)


async def tables(bench, run):
    """What the tables say now: of the run, its tickets and its own budgets."""
    table = await bench.storage.events.fold(bench.tenant, lambda _: None)
    tickets = {key: each for key, each in table.tickets.items() if each.run_id == run.id}
    return table.runs[run.id], tickets, booked(table.budgets, run)


def booked(budgets, run):
    own = {key: each for key, each in budgets.items() if (key.scope, key.scope_id) == ("run", run.id)}
    return {key: each for key, each in own.items() if each != BudgetStanding()}


async def correct(bench, run, amount, command_id):
    key = BudgetKey(scope=BudgetScope.RUN, scope_id=run.id, unit="EUR")
    by = replace(bench.requester, scopes=frozenset({"plm.budgets"}))
    how = {"reason": "it failed", "command_id": command_id, "by": by}
    await bench.control_plane.correct_budget(bench.tenant, key, Decimal(amount), **how)


async def life(bench):
    """A run from its creation to its end, handed out after each act, and another one that spends beside it."""
    run = await bench.run()
    yield run
    lease = await bench.lease(run)
    yield run
    await bench.ask(lease)
    yield run
    (ticket,) = (await tables(bench, run))[1]
    await bench.control_plane.decide(bench.tenant, ticket, TicketDecision.APPROVE, approver=bench.approver)
    yield run
    lease = await bench.lease(run)
    grant = await bench.begun(lease, capability="thing.write", ticket_id=ticket)
    yield run
    await bench.settle(grant, lease, capability_id="thing.write")
    yield run
    await bench.begun(await bench.lease())  # of another run, on the same budget of the tenant
    yield run
    grant = await bench.begun(lease, step_index=1, step_id="second")
    await bench.settle(grant, lease, usage={"thing": Decimal(7)})
    yield run
    await correct(bench, run, "-0.03", "c1")
    yield run
    ended = {"state": RunState.SUCCEEDED, "actor": "worker:w", "result": {"n": [1, None]}}
    await bench.storage.runs.finish(bench.tenant, run.id, fencing_token=lease.fencing_token, **ended)
    yield run


async def test_at_every_moment_a_run_was_what_the_tables_said_then(bench):
    said = [(await bench.storage.runs.now(), run, await tables(bench, run)) async for run in life(bench)]
    for moment, run, then in said:
        found = await as_of(bench, run, moment)
        assert (found.run, found.tickets, booked(found.budgets, run)) == then
        assert (found.run_id, found.at) == (run.id, moment)
    states = [run.state for _, _, (run, _, _) in said]
    assert {RunState.QUEUED, RunState.AWAITING_APPROVAL, RunState.RUNNING, RunState.SUCCEEDED} == set(states)
    assert [each.spent for each in said[-1][2][2].values() if each.spent % 1] == [Decimal("0.04")]


async def test_at_each_event_a_run_was_as_it_was_when_that_was_the_last(bench):
    said = {}
    async for run in life(bench):
        events = await bench.storage.events.read(bench.tenant, run_stream(run.id))
        said.setdefault(events[-1].seq, await tables(bench, run))  # a correction stands in another stream
    for seq, then in said.items():
        found = await as_of(bench, run, seq)
        assert (found.run, found.tickets, booked(found.budgets, run)) == then
        assert (found.seq, found.at) == (seq, events[seq - 1].occurred_at)
        assert (await as_of(bench, run, found.at)).seq >= seq, "what happened at that very time is in it"
    assert (await as_of(bench, run, 1)).run.state is RunState.QUEUED
    assert {each.state for each in (await as_of(bench, run, 3)).tickets.values()} == {TicketState.PENDING}


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        (0, "from 1 up"),
        (-1, "from 1 up"),
        (True, "from 1 up"),
        (1.0, "from 1 up"),
        (float("nan"), "from 1 up"),
        (Decimal("NaN"), "from 1 up"),
        ("2030-01-31", "from 1 up"),
        (None, "from 1 up"),
        (2, "ends with event 1"),
        (2**70, "ends with event 1"),
        (datetime(2026, 1, 1), "needs a time zone"),  # noqa: DTZ001  # that is the point
        (datetime(2020, 1, 1, tzinfo=UTC), "the run began at"),
        (datetime.max.replace(tzinfo=UTC), "lies in the future"),
    ],
    ids=repr,
)
async def test_a_moment_that_is_none_is_refused_and_named(bench, moment, why):
    run = await bench.run()
    with pytest.raises(InvalidRequest, match=why) as refused:
        await as_of(bench, run, moment)
    assert refused.value.field == "moment"


async def test_a_run_that_is_not_there_or_of_another_tenant_has_no_past(bench):
    run = await bench.run()
    for tenant, run_id in ((bench.tenant, uuid.uuid4()), (bench.other().tenant, run.id)):
        with pytest.raises(NotFound, match="run"):
            await bench.control_plane.as_of(tenant, run_id, 1)


async def test_a_stream_longer_than_one_page_is_read_whole(bench, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 2)
    async for run in life(bench):  # noqa: B007  # to its end
        pass
    found = await as_of(bench, run, await bench.storage.runs.now())
    assert (found.run, found.tickets, booked(found.budgets, run)) == await tables(bench, run)


def forge(bench, seq, **values):
    """Change an event, as only a master of the database can."""
    if not hasattr(bench.behind, "jobs"):
        bench.sql("ALTER TABLE events DISABLE TRIGGER ALL")
    bench.behind.set_rows("events", {"seq": seq}, **values)


async def test_a_time_that_came_twice_is_refused_and_a_sequence_is_not(bench):
    run = (await bench.lease()).run
    began = (await as_of(bench, run, 1)).at
    forge(bench, 2, occurred_at=began - timedelta(hours=1))
    forge(bench, 1, occurred_at=began - timedelta(minutes=1))
    with pytest.raises(Conflict, match="the clock was set back") as refused:
        await as_of(bench, run, began - timedelta(minutes=2))
    assert refused.value.reason == "clock_set_back"
    assert (await as_of(bench, run, began)).run.state is RunState.RUNNING
    assert (await as_of(bench, run, 1)).run.state is RunState.QUEUED
    assert (await as_of(bench, run, 2)).run.state is RunState.RUNNING


@pytest.mark.parametrize(("seq", "why"), [(1, "event 1 of run/"), (2, "event 2 of run/")])
async def test_an_event_that_cannot_be_read_is_named_and_nothing_is_guessed(bench, seq, why):
    run = (await bench.lease()).run
    forge(bench, seq, payload="[]")
    with pytest.raises(Conflict, match=why) as refused:
        await as_of(bench, run, 2)
    assert refused.value.reason == "events_unreadable"


async def test_a_beginning_that_tells_of_no_run_is_named(bench):
    run = await bench.run()
    forge(bench, 1, kind="test")
    with pytest.raises(Conflict, match="does not tell how the run began"):
        await as_of(bench, run, 1)


async def forget(bench, folder, *, days_ago=2):
    """Archive what there is and prune it, as if it were that old; what is not covered yet stays."""
    await Checkpointer(bench.storage.checkpoints, Signer(Ed25519PrivateKey.generate())).take(bench.tenant)
    await Archivist(bench.storage, open_archive(str(folder))).archive(bench.tenant)
    with psycopg.connect(bench.database.owner) as owner:
        owner.execute("SELECT set_config('app.tenant_id', %s, true)", [str(bench.tenant)])
        owner.execute("INSERT INTO event_retention VALUES (%s, '1 day')", [bench.tenant])
    bench.sql("ALTER TABLE event_checkpoints DISABLE TRIGGER ALL")
    bench.sql("UPDATE event_checkpoints SET taken_at = taken_at - make_interval(days => %s)", days_ago)
    return await prune_events(bench.storage.checkpoints, bench.tenant, actor="system:test")


@pytest.mark.postgres_only
async def test_what_was_pruned_is_named_and_not_guessed(bench, tmp_path):
    going_on = await bench.lease()
    lease = await bench.lease()
    fencing = {"fencing_token": lease.fencing_token, "state": RunState.SUCCEEDED, "actor": "worker:w"}
    await bench.storage.runs.finish(bench.tenant, lease.run.id, **fencing)
    now = await bench.storage.runs.now()
    assert (await forget(bench, tmp_path)).streams == 1
    for moment in (1, 3, now, now - timedelta(days=900)):
        with pytest.raises(EventsPruned, match=str(lease.run.id)) as told:
            await as_of(bench, lease.run, moment)
        assert (told.value.stream, told.value.before) == (run_stream(lease.run.id), None)
        assert told.value.reason == "events_pruned"
    assert (await as_of(bench, going_on.run, now)).run.state is RunState.RUNNING
    await bench.append(run_stream(lease.run.id), 1)
    with pytest.raises(EventsPruned, match="the events before 4 of the stream") as told:
        await as_of(bench, lease.run, 4)
    assert told.value.before == 4


@pytest.mark.postgres_only
async def test_where_corrections_may_be_gone_only_later_runs_have_a_past(bench, tmp_path):
    """Corrections of budgets stand in the tenant's own stream, which is pruned also where the run goes on."""
    before = (await bench.lease()).run
    await correct(bench, before, "1", "c1")
    assert (await forget(bench, tmp_path)).streams == 1  # the tenant's
    after = (await bench.lease()).run
    await correct(bench, after, "0.5", "c2")
    now = await bench.storage.runs.now()
    with pytest.raises(EventsPruned, match="of the stream tenant were pruned") as told:
        await as_of(bench, before, now)
    assert (told.value.stream, told.value.before) == ("tenant", 2)
    assert [each.spent for each in (await as_of(bench, after, now)).budgets.values()] == [Decimal("0.5")]


@pytest.mark.postgres_only
async def test_what_is_pruned_while_it_is_read_is_no_shorter_past(bench, tmp_path, monkeypatch):
    run = (await bench.lease()).run
    monkeypatch.setattr(module, "_PAGE", 1)
    lease = await bench.storage.runs.get(bench.tenant, run.id)
    ended = {"fencing_token": lease.fencing_token, "state": RunState.FAILED, "actor": "worker:w"}
    await bench.storage.runs.finish(bench.tenant, run.id, **ended)
    read = bench.storage.events.read

    async def pruned_after_one_page(tenant, stream, *, after=0, limit=500):
        page = await read(tenant, stream, after=after, limit=limit)
        if after == 0 and not bench.sql("SELECT 1 FROM event_stubs"):
            await forget(bench, tmp_path)
        return page

    monkeypatch.setattr(bench.storage.events, "read", pruned_after_one_page)
    with pytest.raises(EventsPruned):
        await as_of(bench, run, await bench.storage.runs.now())


@pytest.mark.postgres_only
async def test_the_terminal_shows_a_run_as_it_was(bench, terminal):
    async for run in life(bench):  # noqa: B007  # to its end
        pass
    ended = await bench.storage.runs.now()
    ours = ("--tenant-id", bench.tenant)
    said = await terminal.json("events", "as-of", run.id, 3, *ours)
    assert (said["seq"], said["run"]["state"]) == (3, "awaiting_approval")
    assert [(each["state"], each["capability"]) for each in said["tickets"]] == [("pending", "thing.write")]
    said = await terminal.json("events", "as-of", run.id, ended.isoformat(), *ours)
    amounts = {each["unit"]: (Decimal(each["spent"]), Decimal(each["reserved"])) for each in said["budgets"]}
    assert amounts == {"EUR": (Decimal("0.04"), 0), "calls": (2, 0)}
    said = (await terminal.run("events", "as-of", run.id, ended.isoformat(), *ours)).stdout.splitlines()
    assert said[0].startswith(f"run {run.id} at event ")
    assert said[0].endswith(": succeeded")
    assert said[1].endswith(": used, thing.write on thing/1")
    assert sorted(said[2:]) == ["  budget in EUR: 0.04 spent, 0 reserved", "  budget in calls: 2 spent, 0 reserved"]
    for moment, status, why in (
        ("2999-01-01T00:00Z", 1, "lies in the future"),
        ("2026-01-01", 1, "needs a time zone"),
        ("99", 1, "[invalid_request]"),
        ("yesterday", 2, "neither a time nor the sequence of an event"),
    ):
        assert why in (await terminal.run("events", "as-of", run.id, moment, *ours, status=status)).stderr
    refused = await terminal.json("events", "as-of", uuid.uuid4(), 1, *ours, status=1)
    assert refused["refused"] == "not_found"
