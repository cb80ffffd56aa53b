"""Leases of named resources: one holder at a time, and a late one can do nothing more."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import psycopg
import pytest
from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest, NotFound, StorageUnavailable
from plm_engine_core.control_plane.events.event import TENANT_STREAM
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import RunState
from psycopg.rows import dict_row

pytestmark = pytest.mark.every_storage

NAME = "printer/1"


async def acquired(bench, owner="one", seconds=60.0, name=NAME):
    return await bench.control_plane.acquire_lease(bench.tenant, name, owner=owner, seconds=seconds, by=bench.requester)


async def taken_over(bench):
    """A lease that ran out, and the one that took its place."""
    late = await acquired(bench)
    bench.behind.set_time("resource_leases", "expires_at", -1, {"name": NAME})
    return late, await acquired(bench, "two")


async def test_of_many_who_want_it_at_once_one_holds_it(bench):
    found = await asyncio.gather(*(acquired(bench, f"worker {number}") for number in range(10)))
    (lease,) = [each for each in found if each is not None]
    assert (lease.name, lease.fencing_token) == (NAME, 1)
    assert await bench.storage.leases.list(bench.tenant, limit=9) == [lease]


async def test_a_name_is_another_ones_in_another_tenant(bench):
    assert await acquired(bench) is not None
    assert await acquired(bench.other()) is not None
    assert await acquired(bench, name="printer/2") is not None


async def test_who_renews_keeps_it_and_who_does_not_loses_it(bench):
    lease = await acquired(bench, seconds=1)
    renewed = await bench.control_plane.renew_lease(lease, seconds=3600)
    assert renewed.expires_at > lease.expires_at
    assert await acquired(bench, "two") is None
    bench.behind.set_time("resource_leases", "expires_at", -1, {"name": NAME})
    with pytest.raises(FencingLost, match="no longer held with fencing token 1"):
        await bench.control_plane.require_lease(lease)
    back = await bench.control_plane.renew_lease(lease, seconds=60)  # nobody wanted it meanwhile
    await bench.control_plane.require_lease(back)


async def test_a_late_holder_can_neither_renew_release_nor_begin(bench):
    late, present = await taken_over(bench)
    assert present.fencing_token == late.fencing_token + 1
    plane = bench.control_plane
    held = await bench.lease()
    grant = await bench.grant(held)
    for refused in (
        plane.renew_lease(late, seconds=60),
        plane.release_lease(late, by=bench.requester),
        plane.require_lease(late),
        plane.begin(grant, fencing_token=held.fencing_token, actor="test", lease=late),
    ):
        with pytest.raises(FencingLost):
            await refused
    assert await bench.state(held.run) is RunState.RUNNING
    begun = await plane.begin(grant, fencing_token=held.fencing_token, actor="test", lease=present)
    assert begun.accepted


async def test_a_released_one_is_anybodys_and_its_token_is_never_given_again(bench):
    plane = bench.control_plane
    lease = await acquired(bench)
    for _ in range(2):
        await plane.release_lease(lease, by=bench.requester)
    for refused in (plane.renew_lease(lease, seconds=60), plane.require_lease(lease)):
        with pytest.raises(FencingLost):
            await refused
    assert (await acquired(bench, "two")).fencing_token == 2


async def test_taking_and_releasing_is_on_record(bench):
    lease = await acquired(bench)
    await bench.control_plane.renew_lease(lease, seconds=60)
    await bench.control_plane.release_lease(lease, by=bench.requester)
    events = await bench.storage.events.read(bench.tenant, TENANT_STREAM)
    told = {"name": NAME, "owner": "one", "fencing_token": 1}
    assert [(event.kind, event.data) for event in events] == [("lease_taken", told), ("lease_released", told)]
    assert {event.actor for event in events} == {bench.requester.actor}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": " "}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"owner": "a\nb"}, "owner"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": 86_401}, "seconds"),
    ],
)
async def test_what_cannot_be_a_lease_is_refused(bench, changes, field):
    terms = {"name": NAME, "owner": "one", "seconds": 60.0, **changes}
    with pytest.raises(InvalidRequest) as refused:
        await bench.control_plane.acquire_lease(bench.tenant, by=bench.requester, **terms)
    assert refused.value.field == field


async def test_a_tenant_that_does_not_exist_has_none(bench):
    with pytest.raises(NotFound):
        await acquired(replace(bench, tenant=new_id()))


@pytest.mark.postgres_only
async def test_in_a_transaction_of_the_holders_nobody_can_take_it_before_the_end(bench):
    lease = await acquired(bench)
    session = await psycopg.AsyncConnection.connect(bench.database.app, row_factory=dict_row)
    async with session, session.transaction():
        await bench.control_plane.require_lease(lease, connection=session)
        release = asyncio.create_task(bench.control_plane.release_lease(lease, by=bench.requester))
        with pytest.raises(StorageUnavailable):
            await release  # it waits for the holder's transaction, no longer than a lock may
    await bench.control_plane.release_lease(lease, by=bench.requester)
    async with await psycopg.AsyncConnection.connect(bench.database.app, autocommit=True) as bare:
        with pytest.raises(InvalidRequest, match="autocommit"):
            await bench.control_plane.require_lease(lease, connection=bare)
