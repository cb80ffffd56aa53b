"""What was decided under a definition of a capability is carried out, priced, repeated and settled by that one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core import Governor, SyncControlPlane, governed
from plm_engine_core.agent_runtime import Driver, Plan, PlanAgent, Selector
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Outcome, Pending
from plm_engine_core.control_plane.errors import IdempotencyConflict, InvalidRequest
from plm_engine_core.control_plane.hitl.ticket import ScopeTerms
from plm_engine_core.control_plane.policy.facts import WHO_MAY, calls_alike, stored_capability
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, CostBound
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    CapabilityMode,
    CapabilityStatus,
    LockScope,
    OutcomeStatus,
    Reason,
    RunState,
    TicketDecision,
)
from psycopg.types.json import Jsonb

pytestmark = pytest.mark.every_storage

READ, WRITE = "thing.read", "thing.write"
DEARER = CostBound(max_eur=Decimal(1), eur_per_unit={"thing": Decimal("0.09")})
ANEW = [
    {"version": "2"},
    {"cost": DEARER},
    {"security_relevant": ("size",)},
    {"plugin": "others"},
    {"idempotent": False},
    {"status": CapabilityStatus.RETIRED},
    None,
]


def defined(bench, capability_id, changes):
    """The same books, seen by a process whose file defines a capability otherwise; None: not at all."""
    plane = bench.control_plane
    anew = [
        each.model_copy(update=changes or {}) if each.id == capability_id else each
        for each in plane.registry
        if each.id != capability_id or changes is not None
    ]
    made = ControlPlane(policy=plane.policy, registry=CapabilityRegistry(anew), storage=plane.storage)
    return replace(bench, control_plane=made)


@pytest.mark.parametrize("changes", ANEW, ids=lambda changes: next(iter(changes)) if changes else "removed")
async def test_a_proposal_that_is_made_again_is_answered_by_the_definition_that_granted_it(bench, changes):
    lease = await bench.lease()
    granted = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(granted, Granted)
    assert granted.capability is bench.control_plane.registry.get(READ)
    assert await bench.control_plane.admit(bench.proposal(lease)) == granted
    anew = defined(bench, READ, changes)
    assert await anew.control_plane.admit(anew.proposal(lease)) == granted
    assert await bench.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 1)
    with pytest.raises(IdempotencyConflict):
        await anew.control_plane.admit(anew.proposal(lease, arguments={"name": "two"}))


async def test_a_refusal_stands_too_when_its_capability_is_defined_anew(bench):
    lease = await bench.lease()
    proposal = bench.proposal(lease, capability="thing.gone")
    refused = await bench.control_plane.admit(proposal)
    assert refused.reason is Reason.CAPABILITY_UNKNOWN
    known = bench.control_plane.registry.get(READ).model_copy(update={"id": "thing.gone"})
    plane = ControlPlane(policy=bench.control_plane.policy, registry=CapabilityRegistry([known]), storage=bench.storage)
    assert await plane.admit(proposal) == refused
    assert isinstance(await plane.admit(bench.proposal(lease, capability="thing.gone", attempt=2)), Granted)


async def test_the_price_is_that_of_the_decision_on_any_node(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    outcome = Outcome(status=OutcomeStatus.SUCCEEDED, usage={"thing": Decimal(7)})
    for other in (defined(bench, READ, {"cost": DEARER}), defined(bench, READ, None)):
        settled = await other.control_plane.settle(
            grant, outcome, fencing_token=lease.fencing_token, trace_id=lease.run.trace_id, actor="test"
        )
        assert settled.spent["EUR"] == "0.07"


async def test_a_grant_of_which_nothing_is_recorded_is_not_settled_by_guessing(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    with pytest.raises(InvalidRequest, match="nothing is recorded of what grant"):
        await bench.control_plane.settle(
            replace(grant, attempt=7),
            Outcome(status=OutcomeStatus.SUCCEEDED),
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="test",
        )


async def test_what_was_decided_is_read_in_its_own_tenant_only(bench):
    lease, _ = await bench.ask()
    books, place = bench.storage.admission, (lease.run.id, 0, 1)
    described = await books.decided_on(bench.tenant, *place)
    assert described["id"] == WRITE
    other = bench.behind.new_tenant()
    assert await books.decided_on(other, *place) is None


@pytest.mark.postgres_only
async def test_on_a_connection_of_the_callers_it_is_the_same_but_for_a_digest_that_changed(bench):
    lease = await bench.lease()
    async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
        granted = await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        dearer = defined(bench, READ, {"cost": DEARER})
        again = await dearer.control_plane.admit(bench.proposal(lease), connection=connection)
        assert again == granted  # read in the transaction in which it was booked
        grant = granted.grant
        await connection.commit()
        anew = defined(bench, READ, {"version": "2"})
        with pytest.raises(IdempotencyConflict):
            await anew.control_plane.admit(bench.proposal(lease), connection=connection)
        await connection.rollback()
        assert await anew.control_plane.admit(bench.proposal(lease)) == granted
        await bench.begin(grant, lease)
        settled = await anew.control_plane.settle(
            grant,
            Outcome(status=OutcomeStatus.SUCCEEDED, usage={"thing": Decimal(1)}),
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="test",
            connection=connection,
        )
        assert settled.spent["EUR"] == "0.01"


ANOTHER_CALL = [
    {"version": "2"},
    {"mode": CapabilityMode.PLAN_WRITE, "approval": True, "certified": False},
    {"plugin": "others"},
    {"idempotent": False},
    {"stateless": True},
    {"model_argument": "name"},
    {"cost": DEARER},
    {"timeout_seconds": 1.0},
    {"security_relevant": ("size",)},
    {"network": True, "cost": DEARER},
    {"lock": LockScope.TENANT},
]
THE_SAME_CALL = [
    {"description": "Change one thing"},
    {"status": CapabilityStatus.DEPRECATED},
    {"required_scopes": frozenset({"things.read", "things.write"})},
]
UNREADABLE = '{"decision": {"facts": {"capability": "?"}}}'


def first_key(changes):
    return next(iter(changes))


class TestApprovals:
    """An approval is of the call as it was defined when somebody was asked."""

    @pytest.mark.parametrize("changes", ANOTHER_CALL, ids=first_key)
    async def test_it_authorises_no_call_that_means_something_else_by_now(self, bench, changes):
        lease, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE)
        anew = defined(bench, WRITE, changes)
        lease = await bench.lease(lease.run)
        asked = {"capability": WRITE, "ticket_id": pending.ticket_id}
        for attempt in (1, 2):  # nor does the attempt after it, whose predecessor was decided under the new definition
            denied = await anew.control_plane.admit(bench.proposal(lease, attempt=attempt, **asked))
            assert isinstance(denied, Denied)
            assert denied.reason is Reason.APPROVAL_MISMATCH
            assert denied.unblock == "an approval of this very call, asked for anew"
        anew_asked = await anew.control_plane.admit(bench.proposal(lease, attempt=3, capability=WRITE))
        assert isinstance(anew_asked, Pending)
        await bench.decide(anew_asked, TicketDecision.APPROVE)
        lease = await bench.lease(lease.run)
        asked["ticket_id"] = anew_asked.ticket_id
        granted = await anew.control_plane.admit(bench.proposal(lease, attempt=3, **asked))
        assert isinstance(granted, Granted)
        assert granted.capability == anew.control_plane.registry.get(WRITE)
        assert await bench.control_plane.admit(bench.proposal(lease, attempt=3, **asked)) == granted

    @pytest.mark.parametrize("changes", THE_SAME_CALL, ids=first_key)
    async def test_it_stands_where_only_words_changed_or_who_may_call(self, bench, changes):
        lease, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE)
        lease = await bench.lease(lease.run)
        anew = defined(bench, WRITE, changes).control_plane
        granted = await anew.admit(bench.proposal(lease, capability=WRITE, ticket_id=pending.ticket_id))
        assert isinstance(granted, Granted)

    async def test_one_whose_question_cannot_be_read_authorises_nothing(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE)
        lease = await bench.lease(lease.run)
        bench.behind.forge("events", {"kind": "approval_requested"}, payload=UNREADABLE)
        denied = await bench.control_plane.admit(bench.proposal(lease, capability=WRITE, ticket_id=pending.ticket_id))
        assert denied.reason is Reason.APPROVAL_MISMATCH


class TestApprovalScopes:
    """An approval scope covers the call as it was defined when somebody was asked, and left it behind."""

    @pytest.fixture
    async def standing(self, bench):
        """A bench where one stands, for five calls on one resource."""
        bench = bench.with_policy(approval={"standing": {"max_uses": 5, "max_seconds": 600, "max_risk": "high"}})
        self.lease, self.asked = await bench.ask()
        await bench.decide(self.asked, TicketDecision.APPROVE, scope=ScopeTerms(uses=5, seconds=600))
        return bench

    async def admitted(self, bench):
        return await bench.control_plane.admit(bench.proposal(await bench.lease(), capability=WRITE))

    @pytest.mark.parametrize("changes", ANOTHER_CALL, ids=first_key)
    async def test_of_a_call_that_means_something_else_by_now_somebody_is_asked_anew(self, standing, changes):
        anew = defined(standing, WRITE, changes)
        assert isinstance(await self.admitted(standing), Granted)
        asked = await self.admitted(anew)
        assert isinstance(asked, Pending)
        assert isinstance(await self.admitted(standing), Granted)  # by a node that has not read its file anew yet
        await anew.decide(asked, TicketDecision.APPROVE, scope=ScopeTerms(uses=1, seconds=600))
        assert isinstance(await self.admitted(anew), Granted)
        assert isinstance(await self.admitted(anew), Pending)
        (first, second) = await standing.storage.approvals.scopes(standing.tenant, limit=9, after=None)
        assert (first.used, second.used) == (2, 1)

    @pytest.mark.parametrize("changes", THE_SAME_CALL, ids=first_key)
    async def test_it_stands_where_only_words_changed_or_who_may_call(self, standing, changes):
        assert isinstance(await self.admitted(defined(standing, WRITE, changes)), Granted)

    async def test_it_is_of_the_question_and_not_of_what_its_attempt_became(self, standing):
        anew = defined(standing, WRITE, {"version": "2"})
        lease = await standing.lease(self.lease.run)
        again = standing.proposal(lease, capability=WRITE, ticket_id=self.asked.ticket_id)
        assert (await anew.control_plane.admit(again)).reason is Reason.APPROVAL_MISMATCH
        assert isinstance(await self.admitted(anew), Pending)
        assert isinstance(await self.admitted(standing), Granted)

    async def test_one_whose_question_cannot_be_read_covers_nothing(self, standing):
        standing.behind.forge("events", {"kind": "approval_requested"}, payload=UNREADABLE)
        assert isinstance(await self.admitted(standing), Pending)


def test_of_each_member_of_a_capability_it_is_said_whether_its_change_asks_anew():
    anew = {name for changes in ANOTHER_CALL for name in changes} | {"id"}
    stays = {name for changes in THE_SAME_CALL for name in changes}
    assert stays == WHO_MAY
    assert anew | stays | {"allowed_tenants", "denied_tenants"} == set(CapabilityDescriptor.model_fields)


def in_full(capability):
    """As earlier releases recorded a definition: with what is as by default."""
    later = {"lock", "allowed_tenants", "denied_tenants"}
    return {**capability.model_dump(mode="json", exclude=later), "required_scopes": sorted(capability.required_scopes)}


class TestRecordedByAnEarlierRelease:
    """What was asked before an upgrade, or beside it by a node of the release before, stands all the same."""

    async def asked(self, bench, **keywords):
        lease, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE, **keywords)
        (event,) = [row for row in bench.behind.rows("events") if row["kind"] == "approval_requested"]
        payload = json.loads(event["payload"])
        payload["decision"]["facts"]["capability"] = in_full(bench.control_plane.registry.get(WRITE))
        bench.behind.forge("events", {"kind": "approval_requested"}, payload=json.dumps(payload))
        return await bench.lease(lease.run), pending

    async def test_a_ticket_authorises_its_call(self, bench):
        lease, pending = await self.asked(bench)
        again = bench.proposal(lease, capability=WRITE, ticket_id=pending.ticket_id)
        assert isinstance(await bench.control_plane.admit(again), Granted)

    async def test_an_approval_scope_covers_its_calls(self, bench):
        bench = bench.with_policy(approval={"standing": {"max_uses": 5, "max_seconds": 600, "max_risk": "high"}})
        await self.asked(bench, scope=ScopeTerms(uses=5, seconds=600))
        call = bench.proposal(await bench.lease(), capability=WRITE)
        assert isinstance(await bench.control_plane.admit(call), Granted)
        other = defined(bench, WRITE, {"version": "2"}).control_plane
        assert isinstance(await other.admit(bench.proposal(await bench.lease(), capability=WRITE)), Pending)

    @pytest.mark.postgres_only
    @pytest.mark.parametrize(
        "changes", [{}, *ANOTHER_CALL, *THE_SAME_CALL], ids=lambda each: first_key(each or {"": 0})
    )
    async def test_the_database_and_the_policy_read_it_alike(self, bench, changes):
        before = bench.control_plane.registry.get(WRITE)
        after = CapabilityDescriptor.model_validate({**before.model_dump(), **changes})
        for one, other, alike in (
            (in_full(before), stored_capability(after), changes in [{}, *THE_SAME_CALL]),
            (in_full(before), stored_capability(before), True),
            (stored_capability(after), in_full(after) | ({"lock": "tenant"} if after.lock else {}), True),
        ):
            assert calls_alike(one, other) is calls_alike(other, one) is alike
            asked = "SELECT engine_calls_alike_v1(%s, %s)"
            assert (
                bench.sql(asked, Jsonb(one), Jsonb(other)) == bench.sql(asked, Jsonb(other), Jsonb(one)) == [(alike,)]
            )


class Exchanging:
    """An executor in whose first call something happens, after it began; it hangs where that answers true."""

    def __init__(self, meanwhile):
        self.meanwhile, self.entered, self.calls = [meanwhile], asyncio.Event(), []

    def offers(self, capability):
        return capability.plugin == "things"

    async def cancel(self, grant):
        raise AssertionError(grant)

    async def execute(self, call, grant, progress):
        begun = await call.begin()
        assert begun.accepted
        self.calls.append(call.capability)
        if self.meanwhile and await self.meanwhile.pop()():
            self.entered.set()
            await asyncio.get_running_loop().create_future()
        return Outcome(status=OutcomeStatus.SUCCEEDED, usage={"thing": Decimal(7)})


def driver(bench, executor):
    plan = Plan.model_validate({"agent": "test", "version": "1", "steps": [{"id": "s0", "capability": READ}]})
    selector = Selector([executor])
    return Driver(control_plane=bench.control_plane, agents=lambda _: PlanAgent(plan), selector=selector, owner="node")


@pytest.mark.parametrize("changes", [{"cost": DEARER}, {"plugin": "others"}, None], ids=str)
async def test_a_driver_settles_a_call_by_what_it_was_granted_as(bench, changes):
    granted_as = bench.control_plane.registry.get(READ)

    async def exchange():
        await bench.control_plane.reload(defined(bench, READ, changes).control_plane.registry)

    executor = Exchanging(exchange)
    run = await bench.run()
    assert await driver(bench, executor).drive(bench.tenant, run.id) is RunState.SUCCEEDED
    assert executor.calls == [granted_as]
    assert await bench.budget(run, "run", BudgetUnit.EUR) == (Decimal("0.07"), 0)


@pytest.mark.parametrize("when", ["before it is closed", "after it was closed"])
@pytest.mark.parametrize("changes", [{"plugin": "others"}, {"idempotent": False}], ids=lambda c: next(iter(c)))
async def test_a_lost_call_is_not_repeated_by_what_would_not_know_of_it(bench, monkeypatch, when, changes):
    anew = defined(bench, READ, changes).control_plane.registry

    async def hang():
        return True

    executor = Exchanging(hang)
    executor.offers = lambda _: True
    run = await bench.run()
    first = asyncio.create_task(driver(bench, executor).drive(bench.tenant, run.id))
    await asyncio.wait_for(executor.entered.wait(), 30)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    bench.let_lease_expire(run)
    second = driver(bench, executor)
    if when == "before it is closed":
        await bench.control_plane.reload(anew)
        assert await second.drive(bench.tenant, run.id) is RunState.OUTCOME_UNKNOWN
    else:
        close = second._close_abandoned

        async def closed(hold):
            await close(hold)
            await bench.control_plane.reload(anew)

        monkeypatch.setattr(second, "_close_abandoned", closed)
        assert await second.drive(bench.tenant, run.id) is RunState.FAILED
        assert (await bench.storage.runs.get(bench.tenant, run.id)).reason == "capability_changed"
    assert len(executor.calls) == 1


async def test_a_definition_that_changes_right_before_admission_decides_who_carries_the_call_out(bench, monkeypatch):
    """What was looked at before is not what was granted: no plugin here has it, so nothing is called."""
    anew = defined(bench, READ, {"plugin": "others"}).control_plane.registry
    admit = bench.control_plane.admit

    async def later(proposal, **keywords):
        await bench.control_plane.reload(anew)
        return await admit(proposal, **keywords)

    monkeypatch.setattr(bench.control_plane, "admit", later)

    async def never():
        raise AssertionError("nothing here offers it")

    executor = Exchanging(never)
    run = await bench.run()
    assert await driver(bench, executor).drive(bench.tenant, run.id) is RunState.FAILED
    (step,) = await bench.storage.runs.steps(bench.tenant, run.id)
    assert (step.state, step.error["category"]) == ("not_started", "capability_changed")
    assert (await bench.storage.runs.get(bench.tenant, run.id)).reason == "capability_unavailable"
    assert await bench.budget(run, "run", BudgetUnit.CALLS) == (0, 0)


def test_a_governed_function_is_settled_by_what_it_was_granted_as():
    """The capability is gone when the function returns, and its call is recorded all the same."""
    with Governor.in_memory({"shop.look": "read"}) as governor:
        assert isinstance(governor.plane, SyncControlPlane)

        async def remove(core):
            await core.reload(CapabilityRegistry(()))

        @governed("shop.look", by=governor)
        def look(item: str) -> str:
            governor.plane.call(remove)
            return item

        assert look("bolt") == "bolt"

        async def states(core):
            runs = await core.storage.runs.list(governor.tenant_id, limit=9, before=None, state=None)
            return [run.state for run in runs]

        assert governor.plane.call(states) == ["succeeded"]
