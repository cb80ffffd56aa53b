"""The fencing token of a run's lease: who lost it, and who never had one, writes nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, RunState

pytestmark = pytest.mark.every_storage

NOBODYS = [None, "1", True, 0, -1, 2, 2**63]  # the holder's is 1


@pytest.mark.parametrize("token", NOBODYS)
async def test_nothing_is_booked_with_a_token_that_is_nobodys(bench, token):
    lease = await bench.lease()
    assert lease.fencing_token == 1
    called, waiting = await bench.begun(lease), await bench.grant(lease, step_index=1, step_id="second")
    before, plane = await bench.kinds(lease.run), bench.control_plane
    third = {"step_index": 2, "step_id": "third", "fencing_token": token}
    for booking in (
        plane.admit(bench.proposal(lease, **third)),
        plane.admit(bench.proposal(lease, **third), begin=True),
        plane.admit(bench.proposal(lease, **third, capability="thing.unheard_of")),
        plane.admit(bench.proposal(lease, **third, capability="thing.write")),
        plane.begin(waiting, fencing_token=token, actor="test"),
        bench.settle(called, replace(lease, fencing_token=token)),
        bench.settle(waiting, replace(lease, fencing_token=token), OutcomeStatus.NOT_STARTED),
        plane.finish(lease.run, fencing_token=token, state=RunState.FAILED, actor="test"),
    ):
        with pytest.raises(FencingLost):
            await booking
    assert await bench.kinds(lease.run) == before
    assert await bench.state(lease.run) is RunState.RUNNING
    assert (await bench.begin(waiting, lease)).accepted


async def test_of_many_who_take_over_one_does_and_the_loser_books_nothing_more(bench):
    lost = await bench.lease(owner="loser")
    called, waiting = await bench.begun(lost), await bench.grant(lost, step_index=1, step_id="second")
    bench.let_lease_expire(lost.run)
    runs, plane = bench.storage.runs, bench.control_plane
    taking = (runs.take(bench.tenant, lost.run.id, owner=f"worker {number}", seconds=60) for number in range(10))
    (held,) = [lease for lease in await asyncio.gather(*taking) if lease is not None]
    assert held.fencing_token == lost.fencing_token + 1
    before = await bench.kinds(lost.run)
    third = {"step_index": 2, "step_id": "third"}
    for booking in (
        plane.admit(bench.proposal(lost, **third)),
        plane.admit(bench.proposal(lost, **third), begin=True),
        plane.admit(bench.proposal(lost, **third, capability="thing.write")),
        bench.begin(waiting, lost),
        bench.settle(called, lost),
        bench.settle(waiting, lost, OutcomeStatus.NOT_STARTED),
        *(
            plane.finish(lost.run, fencing_token=lost.fencing_token, state=state, actor="loser")
            for state in (RunState.FAILED, RunState.HALTED, RunState.QUEUED)
        ),
    ):
        with pytest.raises(FencingLost):
            await booking
    beat = await runs.renew(bench.tenant, lost.run.id, fencing_token=lost.fencing_token, seconds=60)
    assert not beat.held
    assert await bench.kinds(lost.run) == before
    assert (await bench.settle(called, held)).status is OutcomeStatus.SUCCEEDED


@pytest.mark.parametrize("state", [RunState.RUNNING, RunState.AWAITING_APPROVAL, RunState.OUTCOME_UNKNOWN])
async def test_a_run_is_given_back_only_in_a_state_that_its_holder_may_choose(bench, state):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest, match=f"not as {state}") as caught:
        await bench.control_plane.finish(lease.run, fencing_token=lease.fencing_token, state=state, actor="test")
    assert caught.value.field == "state"
    assert await bench.state(lease.run) is RunState.RUNNING
