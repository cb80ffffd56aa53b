"""An admission that uses its grant up: the books are those of admit and begin, and so is who may make the call."""

from __future__ import annotations

import asyncio
import functools
import json

import psycopg
import pytest
from plm_engine_core.control_plane import Denied, Granted, Pending
from plm_engine_core.control_plane.errors import FencingLost, IdempotencyConflict, StorageUnavailable
from plm_engine_core.control_plane.events import rebuild, verify_tenant
from plm_engine_core.control_plane.hitl import ScopeTerms
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    Reason,
    RunKind,
    RunState,
    StepState,
    TicketDecision,
)

pytestmark = pytest.mark.every_storage

CALLS = BudgetUnit.CALLS
STANDING = {"approval": {"standing": {"max_uses": 3, "max_seconds": 600, "max_risk": "high"}}}


async def admitted(bench, lease, *, begin=True, **changes):
    return await bench.control_plane.admit(bench.proposal(lease, **changes), begin=begin)


async def begun(bench, lease, **changes):
    """The grant of an admission that used it up."""
    admission = await admitted(bench, lease, **changes)
    assert isinstance(admission, Granted), admission
    assert admission.begun
    return admission.grant


async def told(bench, lease):
    """What a run's books tell of its step, but for ids, times and hashes; and who said so."""
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    events = (await bench.storage.events.read(bench.tenant, f"run/{lease.run.id}"))[2:]
    known = {str(step.grant_id): "grant", str(lease.run.id): "run"}
    texts = [functools.reduce(lambda text, id_: text.replace(id_, known[id_]), known, each.payload) for each in events]
    payloads = [json.loads(text) for text in texts]
    for payload in payloads:
        payload.pop("decision", None)  # among its facts is the clock of another moment
        payload["answer"] = sorted(payload.get("answer", {}))
    return step.state, payloads, {event.actor for event in events}


async def whole(bench):
    """Whether every chain holds, and events alone tell what the tables say."""
    consistent = all(each.consistent for each in await verify_tenant(bench.storage, bench.tenant))
    return consistent and (await rebuild(bench.storage, bench.tenant))[1] == []


async def test_the_books_are_those_of_an_admission_with_its_begin(bench):
    one, two = await bench.lease(), await bench.lease()
    grant = await begun(bench, one)
    actor = two.run.principal.actor
    await bench.control_plane.begin(await bench.grant(two), fencing_token=two.fencing_token, actor=actor)
    assert await told(bench, one) == await told(bench, two)
    assert (await told(bench, one))[0] is StepState.RUNNING
    assert await bench.kinds(one.run) == ["run_created", "run_taken", "step_granted", "step_started"]
    (row,) = [each for each in bench.behind.rows("grants") if each["id"] == grant.id]
    assert row["state"] == "begun"
    assert row["issued_at"] <= row["begun_at"] < row["expires_at"]
    assert (await bench.settle(grant, one)).spent["calls"] == "1"
    assert await bench.budget(one.run, "run", CALLS) == (1, 0)
    assert await whole(bench)


async def test_every_later_proposal_of_a_run_begins_at_once_too(bench):
    lease = await bench.lease()
    for step in range(3):
        await bench.settle(await begun(bench, lease, step_index=step, step_id=f"s{step}"), lease)
    kinds = await bench.kinds(lease.run)
    assert kinds[2:] == ["step_granted", "step_started", "step_settled"] * 3
    assert await whole(bench)


class TestAskedForAgain:
    """After a lost reply the answer is what was booked, and the call is made once."""

    async def test_the_answer_is_the_same_and_nothing_more_begins(self, bench):
        lease = await bench.lease()
        answers = await asyncio.gather(*(admitted(bench, lease) for _ in range(10)))
        assert all(answer == answers[0] for answer in answers)
        assert answers[0].begun
        assert (await bench.kinds(lease.run)).count("step_started") == 1
        assert await bench.budget(lease.run, "tenant", CALLS) == (0, 1)

    async def test_a_reply_that_was_lost_is_busy_storage_and_the_next_tells_that_it_began(self, bench, monkeypatch):
        original, lost = bench.storage.admission.admit, []

        async def forgetful(*args, **kwargs):
            answer = await original(*args, **kwargs)
            if not lost:
                lost.append(answer)
                raise StorageUnavailable("the reply was lost")
            return answer

        monkeypatch.setattr(bench.storage.admission, "admit", forgetful)
        lease = await bench.lease()
        denied = await admitted(bench, lease)
        assert (denied.reason, (await told(bench, lease))[0]) == (Reason.STORAGE_BUSY, StepState.RUNNING)
        await bench.settle(await begun(bench, lease), lease)

    @pytest.mark.parametrize("first", [True, False])
    async def test_with_the_other_wish_it_is_what_was_booked(self, bench, first):
        lease = await bench.lease()
        answer = await admitted(bench, lease, begin=first)
        assert await admitted(bench, lease, begin=not first) == answer
        assert answer.begun is first
        later = await bench.begin(answer.grant, lease)
        assert later.accepted is not first
        assert later.reason is (Reason.GRANT_USED if first else None)
        assert await whole(bench)

    async def test_neither_an_older_nor_a_newer_holder_may_make_the_call(self, bench):
        old = await bench.lease()
        await begun(bench, old)
        bench.let_lease_expire(old.run)
        with pytest.raises(FencingLost):
            await admitted(bench, old)
        new = await bench.lease(old.run)
        for holder in (old, new):
            with pytest.raises(FencingLost):
                await admitted(bench, holder)

    async def test_once_it_is_settled_nobody_may(self, bench):
        lease = await bench.lease()
        grant = await begun(bench, lease)
        await bench.settle(grant, lease)
        denied = await admitted(bench, lease)
        assert (denied.reason, denied.message) == (
            Reason.GRANT_USED,
            f"grant {grant.id} is settled; a grant is used once",
        )

    async def test_other_content_is_a_conflict(self, bench):
        lease = await bench.lease()
        await begun(bench, lease)
        with pytest.raises(IdempotencyConflict):
            await admitted(bench, lease, arguments={"name": "two"})


class TestRefused:
    """Where admit or begin would refuse, nothing begins and nothing is reserved."""

    async def assert_nothing(self, bench, lease):
        assert await bench.budget(lease.run, "tenant", CALLS) == (0, 0)
        assert "step_started" not in await bench.kinds(lease.run)
        assert bench.behind.rows("grants") == []
        assert await whole(bench)

    async def test_a_run_that_is_being_cancelled_is_granted_nothing(self, bench):
        lease = await bench.lease()
        await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
        for capability in ("thing.read", "thing.write"):
            denied = await admitted(bench, lease, capability=capability, step_index=len(capability))
            assert (denied.reason, denied.rule) == (Reason.CANCEL_REQUESTED, "cancel")
            assert denied.unblock == "nothing: somebody cancelled the run"
        await self.assert_nothing(bench, lease)
        assert (await bench.control_plane.why(bench.tenant, str(lease.run.id))).because.stage == "cancel"

    @pytest.mark.parametrize("scope", list(HaltScope))
    async def test_under_a_halt(self, bench, scope):
        lease = await bench.lease()
        await bench.halt_over(scope, lease.run)
        assert (await admitted(bench, lease)).reason is Reason.HALTED
        await self.assert_nothing(bench, lease)

    async def test_beyond_a_budget(self, bench):
        bench = bench.with_policy(budgets={"run": {"EUR": "5", "calls": "0"}, "tenant": {"EUR": "5", "calls": "5"}})
        lease = await bench.lease()
        assert (await admitted(bench, lease)).reason is Reason.BUDGET_EXCEEDED
        await self.assert_nothing(bench, lease)

    async def test_beyond_the_rate(self, bench):
        bench = bench.with_policy(rate_limit={"per_second": 0.0001, "burst": 1})
        lease = await bench.lease()
        await bench.settle(await begun(bench, lease), lease)
        denied = await admitted(bench, lease, step_index=1)
        assert denied.reason is Reason.RATE_LIMIT_EXCEEDED
        assert (await bench.kinds(lease.run)).count("step_started") == 1

    async def test_without_the_lease(self, bench):
        lease = await bench.lease()
        with pytest.raises(FencingLost):
            await admitted(bench, lease, fencing_token=lease.fencing_token - 1)
        bench.let_lease_expire(lease.run)
        with pytest.raises(FencingLost):
            await admitted(bench, lease)
        await self.assert_nothing(bench, lease)


class TestApproved:
    """What waits for a human begins with the admission after the approval."""

    @pytest.mark.parametrize("attempt", [1, 2])
    async def test_by_its_ticket_once(self, bench, attempt):
        lease = await bench.lease()
        asked = await admitted(bench, lease, capability="thing.write")
        assert isinstance(asked, Pending)
        await bench.decide(asked, TicketDecision.APPROVE)
        lease = await bench.lease(lease.run)
        approved = {"capability": "thing.write", "ticket_id": asked.ticket_id}
        grant = await begun(bench, lease, attempt=attempt, **approved)
        await bench.settle(grant, lease, capability_id="thing.write")
        steps = await bench.storage.runs.steps(bench.tenant, lease.run.id)
        assert (steps[-1].state, steps[-1].attempt) == (StepState.SUCCEEDED, attempt)
        assert steps[-1].started_at <= steps[-1].finished_at
        again = await admitted(bench, lease, attempt=attempt + 1, **approved)
        assert again.reason is Reason.APPROVAL_MISMATCH
        assert await whole(bench)

    async def test_by_a_standing_approval_as_often_as_that_says(self, bench):
        bench = bench.with_policy(**STANDING)
        lease, asked = await bench.ask()
        await bench.control_plane.decide(
            bench.tenant,
            asked.ticket_id,
            TicketDecision.APPROVE,
            approver=bench.approver,
            scope=ScopeTerms(uses=1, seconds=60),
        )
        lease = await bench.lease()
        await begun(bench, lease, capability="thing.write")
        (scope,) = await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None)
        assert scope.used == 1
        assert isinstance(await admitted(bench, lease, capability="thing.write", step_index=1), Pending)


async def test_who_is_gone_after_it_leaves_a_call_of_unknown_outcome(bench):
    run = await bench.run(kind=RunKind.EXTERNAL)
    lease = await bench.storage.runs.take(bench.tenant, run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    await begun(bench, lease)
    bench.let_lease_expire(run)
    await Recovery(bench.storage).sweep()
    assert await bench.state(run) is RunState.OUTCOME_UNKNOWN
    assert await bench.budget(run, "tenant", CALLS) == (1, 0)


async def test_of_many_who_begin_at_once_under_a_halt_none_does_after_it(bench):
    """Eight admit and begin without pause while a halt is committed; then the database's own times are looked at."""
    wide = {"EUR": 999, "calls": 999}
    bench = bench.with_policy(budgets={"run": wide, "tenant": wide}, rate_limit={"per_second": 1e6, "burst": 1e6})
    leases = [await bench.lease() for _ in range(8)]
    warm = asyncio.Event()

    async def admit(lease):
        for index in range(10_000):
            answer = await admitted(bench, lease, step_index=index, step_id=f"s{index}")
            if isinstance(answer, Denied):
                assert answer.reason is Reason.HALTED
                return
            await bench.settle(answer.grant, lease)
            if index == 2:
                warm.set()

    async def halt():
        await warm.wait()
        await bench.halt(HaltScope.TENANT)

    await asyncio.gather(halt(), *(admit(lease) for lease in leases))
    (halted,) = bench.behind.rows("halts")
    assert max(grant["begun_at"] for grant in bench.behind.rows("grants")) < halted["triggered_at"]
    assert await whole(bench)


@pytest.mark.postgres_only
async def test_in_a_transaction_of_the_callers_it_begins_with_the_callers_commit(bench):
    lease = await bench.lease()
    for end in ("rollback", "commit"):
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            answer = await bench.control_plane.admit(bench.proposal(lease), begin=True, connection=connection)
            assert answer.begun
            await getattr(connection, end)()
        expected = ["run_created", "run_taken", *(["step_granted", "step_started"] if end == "commit" else [])]
        assert await bench.kinds(lease.run) == expected
    assert await begun(bench, lease) == answer.grant
