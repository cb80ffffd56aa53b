"""Approval tickets: one call, one decision, by another human, in time, used once."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from decimal import Decimal

import pytest
from plm_engine_core.control_plane import Denied, Granted, Principal, Proposal
from plm_engine_core.control_plane.admission.proposal import proposal_digest
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    CapabilityMode,
    HaltScope,
    OutcomeStatus,
    Reason,
    RunState,
    StepState,
    TicketDecision,
    TicketState,
)

pytestmark = pytest.mark.every_storage

APPROVE, DENY = TicketDecision.APPROVE, TicketDecision.DENY


async def again(bench, pending, run, **changes):
    """Take the run up again and propose the approved call, with changes."""
    lease = await bench.lease(run)
    values = {"capability": "thing.write", "ticket_id": pending.ticket_id, **changes}
    return lease, await bench.control_plane.admit(bench.proposal(lease, **values))


async def test_a_pending_call_parks_the_run_as_a_row_without_lease_or_reservation(bench):
    lease, pending = await bench.ask()
    run = await bench.storage.runs.get(bench.tenant, lease.run.id)
    assert run.state is RunState.AWAITING_APPROVAL
    (row,) = bench.behind.rows("run_states")
    assert (row["lease_owner"], row["lease_expires_at"]) == (None, None)
    assert await bench.budget(run, "tenant", BudgetUnit.CALLS) == (0, 0)
    ticket = await bench.storage.approvals.get(bench.tenant, pending.ticket_id)
    assert (ticket.capability, ticket.resource, ticket.arguments) == ("thing.write", "thing/1", {"name": "one"})
    assert (ticket.state, ticket.requested_by) == (TicketState.PENDING, bench.requester.user_id)
    assert ticket.deadline == pending.deadline
    assert await bench.storage.runs.take(bench.tenant, run.id, owner="w", seconds=60) is None


async def test_an_approved_call_is_granted_and_its_approval_is_used_up(bench):
    lease, pending = await bench.ask()
    ticket = await bench.decide(pending, APPROVE, comment="go ahead")
    assert (ticket.state, ticket.decided_by, ticket.comment) == (
        TicketState.APPROVED,
        bench.approver.user_id,
        "go ahead",
    )
    assert await bench.state(lease.run) is RunState.QUEUED
    lease, admission = await again(bench, pending, lease.run)
    assert isinstance(admission, Granted)
    assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).consumed_at is not None
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert (step.attempt, step.state, step.ticket_id) == (1, StepState.GRANTED, pending.ticket_id)


async def test_a_denial_ends_the_call_with_the_approvers_words(bench):
    lease, pending = await bench.ask()
    await bench.decide(pending, DENY, comment="not on a Friday")
    _, denied = await again(bench, pending, lease.run)
    assert (denied.reason, denied.message) == (Reason.APPROVAL_DENIED, "denied by the approver: not on a Friday")


@pytest.mark.parametrize("decision", [APPROVE, DENY])
async def test_a_decision_enqueues_the_run_in_its_own_commit(bench, decision):
    lease, pending = await bench.ask()
    before = bench.deliveries(lease.run)
    await bench.decide(pending, decision)
    assert bench.deliveries(lease.run) == before + 1


async def test_a_decision_whose_job_cannot_be_enqueued_is_no_decision(bench):
    _, pending = await bench.ask()
    bench.behind.refuse_deliveries()
    with pytest.raises(Exception, match="deliveries"):
        await bench.decide(pending, APPROVE)
    assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).state is TicketState.PENDING


async def test_of_thirty_approvers_and_deniers_at_once_one_decides_and_the_others_are_told(bench):
    lease, pending = await bench.ask()
    people = [replace(bench.approver, user_id=uuid.uuid4()) for _ in range(60)]
    answers = await asyncio.gather(
        *(bench.decide(pending, (APPROVE, DENY)[n % 2], approver=who) for n, who in enumerate(people)),
        return_exceptions=True,
    )
    winners = [answer for answer in answers if not isinstance(answer, BaseException)]
    losers = [answer for answer in answers if isinstance(answer, BaseException)]
    assert len(winners) == 1
    assert {(type(each), each.reason) for each in losers} == {(Conflict, "already_decided")}
    assert (await bench.kinds(lease.run)).count("approval_decided") == 1


async def test_the_same_decision_by_the_same_person_answers_the_same(bench):
    _, pending = await bench.ask()
    first = await bench.decide(pending, APPROVE)
    assert await bench.decide(pending, APPROVE) == first
    with pytest.raises(Conflict, match="already approved"):
        await bench.decide(pending, DENY)


class TestWhoDecides:
    """Separation of duties."""

    async def test_not_the_requester(self, bench):
        _, pending = await bench.ask()
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE, approver=bench.requester)
        assert caught.value.reason == "separation_of_duties"

    @pytest.mark.parametrize("kind", ["agent", "system"])
    async def test_nobody_but_a_human(self, bench, kind):
        _, pending = await bench.ask()
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE, approver=replace(bench.approver, actor_kind=kind))
        assert caught.value.reason == "not_human"

    async def test_nobody_without_the_scope(self, bench):
        _, pending = await bench.ask()
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE, approver=replace(bench.approver, scopes=frozenset({"plm.halt"})))
        assert caught.value.missing_scopes == ("plm.hitl.resolve",)

    async def test_nobody_of_another_tenant(self, bench):
        _, pending = await bench.ask()
        other = bench.behind.new_tenant()
        with pytest.raises(NotFound):
            await bench.in_tenant(other).decide(pending, APPROVE)

    @pytest.mark.postgres_only
    async def test_the_table_itself_refuses_the_requester(self, bench):
        _, pending = await bench.ask()
        with pytest.raises(Exception, match="approval_tickets_check"):
            bench.sql(
                "UPDATE approval_tickets SET decided_by = requested_by, state = 'approved' WHERE id = %s",
                pending.ticket_id,
            )


class TestDeadline:
    """It holds when deciding and when using."""

    async def test_nobody_decides_after_it_and_the_run_goes_on_to_its_denial(self, bench):
        lease, pending = await bench.ask()
        bench.let_deadline_pass(pending)
        before = bench.deliveries(lease.run)
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, APPROVE)
        assert caught.value.reason == "approval_expired"
        assert await bench.state(lease.run) is RunState.QUEUED
        assert bench.deliveries(lease.run) == before + 1
        _, denied = await again(bench, pending, lease.run)
        assert denied.reason is Reason.APPROVAL_EXPIRED

    async def test_an_approval_is_not_used_after_it_and_stays_what_it_was(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        bench.let_deadline_pass(pending)
        _, denied = await again(bench, pending, lease.run)
        assert denied.reason is Reason.APPROVAL_EXPIRED
        ticket = await bench.storage.approvals.get(bench.tenant, pending.ticket_id)
        assert (ticket.state, ticket.consumed_at) == (TicketState.APPROVED, None)

    async def test_taking_up_a_run_closes_its_expired_ticket(self, bench):
        lease, pending = await bench.ask()
        bench.let_deadline_pass(pending)
        await bench.lease(lease.run)
        assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).state is TicketState.EXPIRED
        assert (await bench.kinds(lease.run))[-2:] == ["approval_expired", "run_taken"]


class TestWhatIsApproved:
    """One exact call."""

    @pytest.mark.parametrize(
        "change",
        [
            {"arguments": {"name": "two"}},
            {"arguments": {}},
            {"arguments": {"name": None}},
            {"resource": "thing/2"},
            {"ticket_id": uuid.UUID(int=7)},
        ],
        ids=["other value", "missing", "null", "resource", "unknown ticket"],
    )
    async def test_another_call_does_not_match(self, bench, change):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        _, denied = await again(bench, pending, lease.run, **change)
        assert isinstance(denied, Denied)
        assert denied.reason is Reason.APPROVAL_MISMATCH
        assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).consumed_at is None

    async def test_an_argument_without_security_relevance_may_differ_and_is_what_gets_recorded(self, bench):
        lease, pending = await bench.ask(arguments={"name": "one", "note": "a"})
        await bench.decide(pending, APPROVE)
        lease, admission = await again(bench, pending, lease.run, arguments={"name": "one", "note": "b"})
        assert isinstance(admission, Granted)
        (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
        assert step.arguments == {"name": "one", "note": "b"}

    async def test_another_policy_does_not_match(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        _, denied = await again(bench.with_policy(version="2"), pending, lease.run)
        assert denied.reason is Reason.APPROVAL_MISMATCH

    async def test_another_step_of_the_run_does_not_match(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        _, denied = await again(bench, pending, lease.run, step_index=1)
        assert denied.reason is Reason.APPROVAL_MISMATCH

    async def test_another_run_does_not_match(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        _, denied = await again(bench, pending, await bench.run())
        assert denied.reason is Reason.APPROVAL_MISMATCH

    async def test_it_is_used_once(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        lease, admission = await again(bench, pending, lease.run)
        await bench.settle(admission.grant, lease, OutcomeStatus.NOT_STARTED)
        values = {"capability": "thing.write", "ticket_id": pending.ticket_id, "attempt": 2}
        denied = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert denied.reason is Reason.APPROVAL_MISMATCH

    async def test_a_halt_or_a_full_rate_does_not_use_it_up(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        lease = await bench.lease(lease.run)
        halt = await bench.halt(HaltScope.TENANT)
        values = {"capability": "thing.write", "ticket_id": pending.ticket_id}
        denied = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert denied.reason is Reason.HALTED
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        values = {"capability": "thing.write", "ticket_id": pending.ticket_id, "attempt": 2}
        admission = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert isinstance(admission, Granted)

    async def test_every_stage_and_budget_is_checked_anew(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        bench.behind.set_rows("budgets", {"scope_kind": "tenant", "unit": "calls"}, spent=Decimal(1000))
        _, denied = await again(bench, pending, lease.run)
        assert denied.reason is Reason.BUDGET_EXCEEDED
        assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).consumed_at is None


def test_a_digest_binds_capability_resource_and_marked_arguments_only():
    def digest(marked=("a",), *, capability="x.y", resource="r", version="1", **arguments):
        described = CapabilityDescriptor(
            id=capability,
            description="x",
            mode=CapabilityMode.READ,
            plugin="p",
            version=version,
            security_relevant=marked,
        )
        proposal = Proposal(
            tenant_id=uuid.UUID(int=1),
            run_id=uuid.UUID(int=2),
            fencing_token=1,
            step_index=0,
            attempt=1,
            step_id="s",
            capability=capability,
            resource=resource,
            arguments=arguments,
            principal=Principal(user_id=uuid.UUID(int=3), actor_kind="human", scopes=frozenset()),
        )
        return proposal_digest(proposal, described)

    base = digest(a=1)
    assert digest(a=1, b=2) == base
    changed = [
        digest(a=2),
        digest(),
        digest(a=None),
        digest(a=[]),
        digest(a=[1]),
        digest(a="1"),
        digest(("a", "b"), a=1),
        digest(("a", "b"), a=1, b=None),
        digest(resource="s", a=1),
        digest(capability="x.z", a=1),
        digest(version="2", a=1),
    ]
    assert len({base, *changed}) == len(changed) + 1
    assert digest((), a=1) != digest((), a=1, b=2)


async def test_cancelling_the_run_cancels_its_ticket(bench):
    lease, pending = await bench.ask()
    run = await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
    assert run.state is RunState.CANCELLED
    assert (await bench.storage.approvals.get(bench.tenant, pending.ticket_id)).state is TicketState.CANCELLED
    with pytest.raises(Conflict, match="already cancelled"):
        await bench.decide(pending, APPROVE)
    (step,) = await bench.storage.runs.steps(bench.tenant, run.id)
    assert step.state is StepState.CANCELLED


async def test_a_comment_has_a_bound_and_only_storable_text(bench):
    _, pending = await bench.ask()
    with pytest.raises(InvalidRequest, match="10001 characters"):
        await bench.decide(pending, DENY, comment="x" * 10_001)
    for text in ("a\x00", "\ud800"):
        with pytest.raises(InvalidRequest):
            await bench.decide(pending, DENY, comment=text)
    assert (await bench.decide(pending, DENY, comment="x" * 10_000)).state is TicketState.DENIED


async def test_tickets_are_listed_oldest_first_page_by_page(bench):
    tickets = [(await bench.ask())[1].ticket_id for _ in range(5)]
    seen, after = [], None
    while page := await bench.storage.approvals.list(bench.tenant, limit=2, after=after, state=TicketState.PENDING):
        seen += [ticket.id for ticket in page]
        after = (page[-1].created_at, page[-1].id)
    assert seen == tickets
    assert await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=TicketState.DENIED) == []
