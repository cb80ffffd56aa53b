"""Markers: named places in the stream of a run, put there once, in both storages."""

from __future__ import annotations

import asyncio
import math
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from plm_engine_core.control_plane.errors import Conflict, Forbidden, IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.events import rebuild, run_stream
from plm_engine_core.control_plane.markers import LARGEST_DETAILS, Marker
from plm_engine_core.control_plane.vocabulary import RunState, TicketState

pytestmark = pytest.mark.every_storage


async def mark(bench, run, name="before", command_id="c1", **changes):
    said = {"details": {"rows": [12, None]}, "by": bench.requester, **changes}
    return await bench.control_plane.mark(bench.tenant, run.id, name, command_id=command_id, **said)


async def standing(bench):
    """What the tables say of the tenant."""
    return await bench.storage.events.fold(bench.tenant, lambda _: None)


async def end(bench, lease):
    ended = {"fencing_token": lease.fencing_token, "state": RunState.SUCCEEDED, "actor": "worker:w"}
    await bench.storage.runs.finish(bench.tenant, lease.run.id, **ended)


async def test_a_marker_is_one_event_that_changes_nothing(bench):
    lease, _ = await bench.ask()
    before = await standing(bench)
    jobs = bench.deliveries(lease.run)
    marker = await mark(bench, lease.run)
    events = await bench.storage.events.read(bench.tenant, run_stream(lease.run.id))
    assert marker == Marker(run_id=lease.run.id, name="before", seq=len(events))
    assert (events[-1].kind, events[-1].actor) == ("marker", bench.requester.actor)
    assert events[-1].data == {"name": "before", "details": {"rows": [12, None]}}
    assert await standing(bench) == before
    assert bench.deliveries(lease.run) == jobs
    assert (await rebuild(bench.storage, bench.tenant))[1] == []
    assert all(each.consistent for each in await bench.control_plane.verify_events(bench.tenant))
    page = await bench.control_plane.feed(bench.tenant)
    assert [(event.stream, event.seq) for event in page.events if event.kind == "marker"] == [
        (run_stream(lease.run.id), marker.seq)
    ]


async def test_a_marker_without_details_has_none(bench):
    run = await bench.run()
    marker = await mark(bench, run, details=None)
    events = await bench.storage.events.read(bench.tenant, run_stream(run.id), after=marker.seq - 1)
    assert [event.data for event in events] == [{"name": "before", "details": {}}]


async def test_whoever_drives_a_run_goes_on_under_its_lease(bench):
    lease = await bench.lease()
    await mark(bench, lease.run, by=lease.run.principal)
    grant = await bench.begun(lease)
    await mark(bench, lease.run, command_id="c2")
    await bench.settle(grant, lease)
    assert (await bench.kinds(lease.run)).count("marker") == 2


async def test_a_marker_that_is_sent_again_is_put_once_also_at_the_same_time(bench):
    run = await bench.run()
    markers = await asyncio.gather(*(mark(bench, run) for _ in range(8)))
    assert {each.seq for each in markers} == {2}
    assert (await mark(bench, run)).seq == 2
    assert (await mark(bench, run, command_id="c2")).seq == 3, "a name may be used again"
    assert await bench.kinds(run) == ["run_created", "marker", "marker"]


async def test_markers_at_the_same_time_each_have_a_place(bench):
    run = await bench.run()
    markers = await asyncio.gather(*(mark(bench, run, command_id=f"c{number}") for number in range(8)))
    assert sorted(each.seq for each in markers) == [*range(2, 10)]


async def test_a_command_stands_for_one_marker_only(bench):
    run, other = await bench.run(), await bench.run()
    await mark(bench, run)
    for where, changes in ((other, {}), (run, {"name": "after"}), (run, {"details": None})):
        with pytest.raises(IdempotencyConflict, match="already used for another marker"):
            await mark(bench, where, **changes)
    assert await bench.kinds(other) == ["run_created"]


async def test_how_a_run_stood_at_a_marker_is_told_later(bench):
    lease, pending = await bench.ask()
    marker = await mark(bench, lease.run)
    await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
    there = await bench.control_plane.as_of(bench.tenant, lease.run.id, marker.seq)
    assert (there.run.state, there.seq) == (RunState.AWAITING_APPROVAL, marker.seq)
    assert there.tickets[pending.ticket_id].state is TicketState.PENDING


async def test_an_ended_run_gets_no_marker_and_answers_the_one_it_has(bench):
    lease = await bench.lease()
    marker = await mark(bench, lease.run)
    await end(bench, lease)
    assert await mark(bench, lease.run) == marker
    for _ in range(2):
        with pytest.raises(Conflict, match="already succeeded") as refused:
            await mark(bench, lease.run, command_id="c2")
        assert refused.value.reason == "impossible_transition"
    assert (await bench.kinds(lease.run))[-1] == "run_succeeded", "the end of a run stays its last event"


async def test_a_command_that_was_refused_is_not_used_up(bench):
    with pytest.raises(NotFound, match="run"):
        await bench.control_plane.mark(bench.tenant, uuid.uuid4(), "x", command_id="c1", by=bench.requester)
    assert (await mark(bench, await bench.run())).seq == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scopes": frozenset({"plm.halt", "things.write"})}, "missing_scopes"),
        ({"expires_at": datetime.now(UTC) - timedelta(seconds=1)}, "delegation_expired"),
    ],
    ids=["scope", "delegation"],
)
async def test_who_may_not_create_runs_marks_none(bench, changes, reason):
    run = await bench.run()
    with pytest.raises(Forbidden) as refused:
        await mark(bench, run, by=replace(bench.requester, **changes))
    assert refused.value.reason == reason
    assert await bench.kinds(run) == ["run_created"]


DEEP = {}
for _ in range(5_000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": None}, "name"),
        ({"command_id": " "}, "command_id"),
        ({"command_id": "x" * 256}, "command_id"),
        ({"details": [1]}, "details"),
        ({"details": "x"}, "details"),
        ({"details": {"a": {"b": math.nan}}}, "details.a.b"),
        ({"details": {"a": "\0"}}, "details.a"),
        ({"details": {"a": "\ud800"}}, "details.a"),
        ({"details": {"at": datetime(2026, 1, 1, tzinfo=UTC)}}, "details.at"),
        ({"details": {1: 2}}, "details"),
        ({"details": {"a": "é" * (LARGEST_DETAILS // 2)}}, "details"),
        ({"details": DEEP}, "details"),
    ],
    ids=range(14),
)
async def test_what_is_no_marker_is_refused_and_named(bench, changes, field):
    run = await bench.run()
    with pytest.raises(InvalidRequest) as refused:
        await mark(bench, run, **changes)
    assert refused.value.field.startswith(field)
    assert len(str(refused.value)) < 600, "a refusal names the place, and does not repeat what it refuses"
    assert await bench.kinds(run) == ["run_created"]


async def test_details_may_be_as_large_as_is_said(bench):
    run = await bench.run()
    details = {"a": "x" * (LARGEST_DETAILS - len('{"a":""}'))}
    marker = await mark(bench, run, details=details)
    (event,) = await bench.storage.events.read(bench.tenant, run_stream(run.id), after=marker.seq - 1)
    assert event.data["details"] == details
