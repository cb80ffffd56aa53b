"""What tests of users get: time that they move, books in memory, and people who decide."""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime, timedelta

import pytest
from plm_engine_core import CallDenied, CallPending, Governor, governed
from plm_engine_core.control_plane.vocabulary import Reason, TicketState
from plm_engine_core.testing.approvers import approve_all, deny_all
from plm_engine_core.testing.clock import FakeClock

ASKING = {"shop.order": "execute-write"}


@pytest.fixture
def shop(memory_storage):
    """A governor on the fake clock, and a function that needs two approvals."""
    policy = {"approval": {"quorum": 2, "timeout_seconds": 600}}
    with Governor.in_memory(ASKING, policy=policy, storage=memory_storage) as governor:

        @governed("shop.order", by=governor)
        def order(item):
            return f"ordered {item}"

        yield governor, order


def asked(order):
    with pytest.raises(CallPending) as caught:
        order("bolt")
    return caught.value


def test_everyone_approves_by_as_many_as_the_policy_asks(shop):
    governor, order = shop
    pending = asked(order)
    (ticket,) = governor.plane.call(lambda core: approve_all(core, governor.tenant_id, comment="fine"))
    assert (ticket.id, ticket.state, ticket.comment) == (pending.ticket_id, TicketState.APPROVED, "fine")
    votes = governor.plane.call(lambda core: core.storage.approvals.votes(governor.tenant_id, ticket.id))
    assert len({vote.voter for vote in votes}) == 2
    assert pending.resume() == "ordered bolt"
    assert governor.plane.call(lambda core: approve_all(core, governor.tenant_id)) == []


def test_everyone_denies(shop):
    governor, order = shop
    pending = asked(order)
    (ticket,) = governor.plane.call(lambda core: deny_all(core, governor.tenant_id))
    assert ticket.state is TicketState.DENIED
    with pytest.raises(CallDenied):
        pending.resume()


@pytest.mark.parametrize("people", [approve_all, deny_all])
def test_what_nobody_can_decide_any_more_is_left_and_the_rest_decided(shop, fake_clock, people):
    governor, order = shop
    late = asked(order)
    fake_clock.move(7200)
    waiting = asked(order)
    decided = governor.plane.call(lambda core: people(core, governor.tenant_id))
    assert [ticket.id for ticket in decided] == [waiting.ticket_id] != [late.ticket_id]


def test_a_deadline_passes_when_the_clock_is_moved(shop, fake_clock):
    _, order = shop
    pending = asked(order)
    assert pending.deadline == fake_clock() + timedelta(seconds=600)
    fake_clock.move(601)
    with pytest.raises(CallDenied) as caught:
        pending.resume()
    assert caught.value.reason is Reason.APPROVAL_EXPIRED


def test_an_hour_forwards_or_backwards_while_a_call_is_made_loses_no_outcome(shop, fake_clock):
    governor, _ = shop

    @governed("shop.order", by=governor)
    def slow(seconds):
        fake_clock.move(seconds)
        return seconds

    for seconds in (3600, -3600):
        with pytest.raises(CallPending) as caught:
            slow(seconds)
        governor.plane.call(lambda core: approve_all(core, governor.tenant_id))
        assert caught.value.resume() == seconds
    assert all(each.consistent for each in governor.plane.verify_events(governor.tenant_id))


def test_a_clock_needs_a_zone_and_stands_still():
    with pytest.raises(ValueError, match="has no zone"):
        FakeClock(datetime(2030, 1, 1))  # noqa: DTZ001  # the point
    clock = FakeClock()
    assert clock() == clock() == clock.move(5) - timedelta(seconds=5)


async def test_books_in_memory_serve_any_number_of_loops_and_threads(memory_storage):
    tenant = memory_storage.add_tenant(uuid.uuid4())

    async def many():
        return [len(await memory_storage.events.heads(tenant)) for _ in range(50)]

    assert await asyncio.gather(*(asyncio.to_thread(asyncio.run, many()) for _ in range(4))) == [[0] * 50] * 4


@pytest.mark.parametrize("storage_kind", ["memory"])
async def test_a_delivery_that_comes_back_to_the_storage_is_told_so(bench):
    """It would wait for the transaction that it is part of."""
    from plm_engine_core.control_plane.storage.memory import MemoryStorage

    storage = MemoryStorage(deliver=lambda tenant_id, _: storage.add_tenant(tenant_id) and None)
    tenant = storage.add_tenant(bench.tenant)
    plane = type(bench.control_plane)(
        policy=bench.control_plane.policy, registry=bench.control_plane.registry, storage=storage
    )
    with pytest.raises(RuntimeError, match="note the job down"):
        await plane.create_run(bench.request(tenant_id=tenant), principal=bench.requester)
    assert await storage.runs.list(tenant, limit=9, before=None, state=None) == []
