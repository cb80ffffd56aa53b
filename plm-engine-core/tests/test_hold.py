"""The lease while it is held: its heartbeat ends when the hold does, whatever the database makes of that."""

from __future__ import annotations

import asyncio

import pytest
from plm_engine_core.agent_runtime.hold import beat_of, held
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.halts import CANCEL_SECONDS
from plm_engine_core.control_plane.runs.run import Heartbeat


class Leases:
    """Renewals that wait until they are cancelled, and then answer with this."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = asyncio.Event()
        self.renewals = 0

    async def renew(self, *_, **__):
        self.renewals += 1
        self.asked.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if isinstance(self.answer, Exception):
                raise self.answer from None
            return self.answer


async def _renewals_after(bench, leases):
    lease = await bench.lease()
    wake = asyncio.Event()
    async with asyncio.timeout(30):
        async with held(leases, lease, seconds=0.001, asked_at=0, wake=wake):
            await leases.asked.wait()
    return leases.renewals


async def test_a_cancel_that_the_database_turned_into_an_error_ends_the_heartbeat(bench):
    assert await _renewals_after(bench, Leases(StorageUnavailable("the rollback failed"))) == 1


async def test_a_renewal_that_came_through_although_it_was_cancelled_is_the_last(bench):
    assert await _renewals_after(bench, Leases(Heartbeat(held=True))) == 1


@pytest.mark.parametrize("cancel_seconds", [0.5, CANCEL_SECONDS, 86_400])
@pytest.mark.parametrize("lease_seconds", [0.5, 30, 90, 3600, 86_400])
def test_a_halt_is_heard_of_within_what_its_record_promises_however_long_the_lease(lease_seconds, cancel_seconds):
    beat = beat_of(lease_seconds, cancel_seconds)
    assert 0 < beat <= min(lease_seconds / 3, cancel_seconds / 3, CANCEL_SECONDS / 3)
