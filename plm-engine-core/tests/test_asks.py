"""An agent asks a human for an input: one answer, by whom the policy says, in time; it allows nothing."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import replace
from datetime import timedelta

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, InputRequest, Pending
from plm_engine_core.control_plane.errors import Conflict, FencingLost, Forbidden, IdempotencyConflict, InvalidRequest
from plm_engine_core.control_plane.events import as_of, rebuild
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.hitl.inputs import (
    LARGEST_INPUT,
    LARGEST_SCHEMA,
    LONGEST_QUESTION,
    MOST_IN_INPUT,
    MOST_IN_SCHEMA,
    check_ask,
    check_input,
)
from plm_engine_core.control_plane.policy import read_policy
from plm_engine_core.control_plane.registry import AgentRegistry
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    Reason,
    RunState,
    StepState,
    TicketDecision,
    TicketKind,
    TicketState,
)

pytestmark = pytest.mark.every_storage

APPROVE, DENY = TicketDecision.APPROVE, TicketDecision.DENY
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 1}, "note": {"type": ["string", "null"]}},
    "required": ["count"],
    "additionalProperties": False,
}
QUESTION = "How many are wanted?"


@pytest.fixture
def asking(bench):
    """The bench under a policy that lets agents ask."""
    return under(bench)


def under(bench, **rule):
    changes = {name: rule.pop(name) for name in ("escalation", "quorum", "required_scope") if name in rule}
    return bench.with_policy(approval={"input": rule, **changes})


def question(bench, lease, **changes):
    values = {
        "tenant_id": bench.tenant,
        "run_id": lease.run.id,
        "fencing_token": lease.fencing_token,
        "step_index": 0,
        "attempt": 1,
        "step_id": "ask",
        "question": QUESTION,
        "schema": SCHEMA,
        "principal": lease.run.principal,
        "agent": "test",
    }
    return InputRequest(**{**values, **changes})


async def asked(bench, lease=None, **changes):
    """A run that is parked on an ask."""
    lease = lease or await bench.lease()
    answer = await bench.control_plane.ask(question(bench, lease, **changes))
    assert isinstance(answer, Pending), answer
    return lease, answer


async def give(bench, pending, value=None, **keywords):
    value = {"count": 3} if value is None else value
    keywords = {"approver": bench.approver, **keywords}
    return await bench.control_plane.provide_input(bench.tenant, pending.ticket_id, value, **keywords)


async def ticket_of(bench, pending):
    return await bench.storage.approvals.get(bench.tenant, pending.ticket_id)


async def steps_of(bench, run):
    return await bench.storage.runs.steps(bench.tenant, run.id)


async def last_event(bench, run):
    return (await bench.storage.events.read(bench.tenant, run_stream(run.id)))[-1]


async def test_an_ask_parks_the_run_as_a_row_and_reserves_nothing(asking):
    lease, pending = await asked(asking)
    run = await asking.storage.runs.get(asking.tenant, lease.run.id)
    assert (run.state, run.reason, run.message) == (RunState.AWAITING_APPROVAL, "input_required", QUESTION)
    (row,) = asking.behind.rows("run_states")
    assert (row["lease_owner"], row["lease_expires_at"]) == (None, None)
    for unit in BudgetUnit:
        assert await asking.budget(run, "tenant", unit) == (0, 0)
    assert asking.behind.rows("grants") == []
    ticket = await ticket_of(asking, pending)
    assert (ticket.kind, ticket.state, ticket.input) == (TicketKind.INPUT, TicketState.PENDING, None)
    assert ticket.arguments == {"question": QUESTION, "schema": SCHEMA}
    assert (ticket.requested_by, ticket.deadline) == (asking.requester.user_id, pending.deadline)
    assert pending.reason is Reason.INPUT_REQUIRED
    assert pending.unblock == "an input by a person with plm.hitl.resolve within 3600 s"
    listed = await asking.storage.approvals.list(asking.tenant, limit=9, after=None, state=TicketState.PENDING)
    assert listed == [ticket]


async def test_an_input_is_the_output_of_the_step_that_asked_and_says_who_gave_it(asking):
    lease, pending = await asked(asking)
    before = asking.deliveries(lease.run)
    ticket = await give(asking, pending, {"count": 3, "note": None}, comment="as usual")
    assert (ticket.state, ticket.decided_by, ticket.comment) == (
        TicketState.APPROVED,
        asking.approver.user_id,
        "as usual",
    )
    assert ticket.input == {"count": 3, "note": None}
    (step,) = await steps_of(asking, lease.run)
    assert (step.state, step.output, step.grant_id) == (StepState.SUCCEEDED, {"count": 3, "note": None}, None)
    assert await asking.state(lease.run) is RunState.QUEUED
    assert asking.deliveries(lease.run) == before + 1
    event = await last_event(asking, lease.run)
    assert (event.kind, event.actor) == ("approval_decided", asking.approver.actor)
    told = {name: event.data[name] for name in ("input", "vote", "decision", "ticket_kind", "comment")}
    assert told == {
        "input": {"count": 3, "note": None},
        "vote": "provide_input",
        "decision": "approved",
        "ticket_kind": "input",
        "comment": "as usual",
    }
    assert await asking.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 0)


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, "null", 1.5])
async def test_without_a_schema_any_json_value_is_an_input(asking, value):
    lease, pending = await asked(asking, schema={})
    ticket = await asking.control_plane.provide_input(asking.tenant, pending.ticket_id, value, approver=asking.approver)
    (step,) = await steps_of(asking, lease.run)
    assert (step.state, step.output, ticket.input) == (StepState.SUCCEEDED, value, value)
    assert (await last_event(asking, lease.run)).data["input"] == value
    assert await give(asking, pending, value) == ticket if value is not None else True


async def test_an_input_whose_job_cannot_be_enqueued_is_none(asking):
    lease, pending = await asked(asking)
    asking.behind.refuse_deliveries()
    with pytest.raises(Exception, match="deliveries"):
        await give(asking, pending)
    assert (await ticket_of(asking, pending)).state is TicketState.PENDING
    (step,) = await steps_of(asking, lease.run)
    assert (step.state, step.output) == (StepState.AWAITING_APPROVAL, None)


async def test_a_denial_refuses_the_step_with_the_humans_words(asking):
    lease, pending = await asked(asking)
    await asking.decide(pending, DENY, comment="ask somebody else")
    (step,) = await steps_of(asking, lease.run)
    assert step.state is StepState.DENIED
    assert step.error["reason"] == Reason.INPUT_DENIED
    assert step.error["message"] == "no input was given: ask somebody else"
    assert await asking.state(lease.run) is RunState.QUEUED


async def test_an_ask_that_nobody_answers_in_time_is_refused(asking):
    lease, pending = await asked(asking)
    asking.let_deadline_pass(pending)
    with pytest.raises(Conflict) as caught:
        await give(asking, pending)
    assert (caught.value.reason, "the ask is denied" in str(caught.value)) == ("approval_expired", True)
    (step,) = await steps_of(asking, lease.run)
    assert (step.state, step.error["reason"]) == (StepState.DENIED, Reason.INPUT_EXPIRED)
    assert (await ticket_of(asking, pending)).state is TicketState.EXPIRED
    assert await asking.state(lease.run) is RunState.QUEUED


async def test_a_sweep_ends_an_ask_whose_time_is_over_and_wakes_the_run_once(asking):
    lease, pending = await asked(asking)
    asking.let_deadline_pass(pending)
    before = asking.deliveries(lease.run)
    assert await asking.storage.runs.revive(asking.tenant, lease.run.id, patience_seconds=60)
    assert not await asking.storage.runs.revive(asking.tenant, lease.run.id, patience_seconds=60)
    assert asking.deliveries(lease.run) == before + 1
    (step,) = await steps_of(asking, lease.run)
    assert (step.state, step.error["reason"]) == (StepState.DENIED, Reason.INPUT_EXPIRED)


async def test_an_ask_is_handed_on_once_where_the_policy_says_so(bench):
    asking = under(bench, escalation={"required_scope": "plm.lead", "timeout_seconds": 60})
    lease, pending = await asked(asking)
    asking.let_deadline_pass(pending)
    with pytest.raises(Conflict) as caught:
        await give(asking, pending)
    assert caught.value.reason == "escalated"
    assert await asking.state(lease.run) is RunState.AWAITING_APPROVAL
    with pytest.raises(Forbidden) as refused:
        await give(asking, pending)
    assert refused.value.missing_scopes == ("plm.lead",)
    lead = replace(asking.approver, user_id=uuid.uuid4(), scopes=frozenset({"plm.lead"}))
    assert (await give(asking, pending, approver=lead)).state is TicketState.APPROVED


async def test_of_thirty_inputs_and_denials_at_once_one_counts_and_the_others_are_told(asking):
    lease, pending = await asked(asking)
    people = [replace(asking.approver, user_id=uuid.uuid4()) for _ in range(60)]
    answers = await asyncio.gather(
        *(
            give(asking, pending, {"count": n + 1}, approver=who)
            if n % 2
            else asking.decide(pending, DENY, approver=who)
            for n, who in enumerate(people)
        ),
        return_exceptions=True,
    )
    winners = [answer for answer in answers if not isinstance(answer, BaseException)]
    losers = [answer for answer in answers if isinstance(answer, BaseException)]
    assert len(winners) == 1
    assert {(type(each), each.reason) for each in losers} == {(Conflict, "already_decided")}
    assert (await asking.kinds(lease.run)).count("approval_decided") == 1
    (step,) = await steps_of(asking, lease.run)
    (number,) = [n for n, answer in enumerate(answers) if not isinstance(answer, BaseException)]
    assert step.state is (StepState.SUCCEEDED if number % 2 else StepState.DENIED)
    assert step.output == ({"count": number + 1} if number % 2 else None)


async def test_the_same_input_by_the_same_person_answers_the_same_and_another_one_is_too_late(asking):
    lease, pending = await asked(asking)
    first = await give(asking, pending)
    assert await give(asking, pending) == first
    for value, who in (({"count": 4}, asking.approver), ({"count": 3}, asking.requester)):
        with pytest.raises(Conflict) as caught:
            await give(asking, pending, value, approver=replace(who, scopes=asking.approver.scopes))
        assert caught.value.reason == "already_decided"
    with pytest.raises(Conflict, match="already approved"):
        await asking.decide(pending, DENY)
    assert (await asking.kinds(lease.run)).count("approval_decided") == 1


class TestWhoAnswers:
    """An input allows nothing, so it needs no second person, unless the policy says so; it needs the authority."""

    async def test_who_the_run_works_for_may_answer_with_the_scope(self, asking):
        _, pending = await asked(asking)
        requester = replace(asking.requester, scopes=asking.approver.scopes)
        assert (await give(asking, pending, approver=requester)).decided_by == asking.requester.user_id

    async def test_or_deny(self, asking):
        _, pending = await asked(asking)
        requester = replace(asking.requester, scopes=asking.approver.scopes)
        assert (await asking.decide(pending, DENY, approver=requester)).state is TicketState.DENIED

    async def test_unless_the_policy_has_somebody_else_answer(self, bench):
        asking = under(bench, by_requester=False)
        _, pending = await asked(asking)
        requester = replace(asking.requester, scopes=asking.approver.scopes)
        with pytest.raises(Forbidden) as caught:
            await give(asking, pending, approver=requester)
        assert caught.value.reason == "separation_of_duties"
        with pytest.raises(Forbidden) as caught:
            await asking.decide(pending, DENY, approver=requester)
        assert caught.value.reason == "separation_of_duties"
        assert (await give(asking, pending)).state is TicketState.APPROVED

    async def test_with_the_scope_that_the_policy_names(self, bench):
        asking = under(bench, required_scope="plm.answers")
        _, pending = await asked(asking)
        # of the approvals, as an ask names none of its own here
        with pytest.raises(Forbidden) as caught:
            await give(asking, pending)
        assert caught.value.missing_scopes == ("plm.answers",)
        own = bench.with_policy(approval={"input": {"required_scope": "plm.own"}})
        with pytest.raises(Forbidden) as caught:
            await give(own, pending)
        assert caught.value.missing_scopes == ("plm.own",)

    async def test_no_agent_answers(self, asking):
        _, pending = await asked(asking)
        with pytest.raises(Forbidden) as caught:
            await give(asking, pending, approver=replace(asking.approver, actor_kind="agent"))
        assert caught.value.reason == "not_human"

    async def test_one_answer_is_enough_whatever_quorum_approvals_need(self, bench):
        asking = under(bench, quorum=3)
        _, pending = await asked(asking)
        assert (await give(asking, pending)).state is TicketState.APPROVED

    async def test_a_policy_that_lets_nobody_ask_any_more_takes_no_input(self, asking, bench):
        _, pending = await asked(asking)
        with pytest.raises(Forbidden) as caught:
            await give(bench, pending)
        assert caught.value.reason == "input_not_allowed"
        assert (await bench.decide(pending, DENY)).state is TicketState.DENIED


class TestOtherKind:
    """An approval is no answer, and an answer no approval."""

    async def test_an_ask_cannot_be_approved(self, asking):
        lease, pending = await asked(asking)
        with pytest.raises(Conflict, match="give it with provide_input, or deny it") as caught:
            await asking.decide(pending, APPROVE)
        assert caught.value.reason == "ticket_kind"
        assert await asking.state(lease.run) is RunState.AWAITING_APPROVAL

    async def test_an_approval_takes_no_input(self, asking):
        lease, pending = await asking.ask()
        with pytest.raises(Conflict, match="approve or deny it") as caught:
            await give(asking, pending)
        assert caught.value.reason == "ticket_kind"
        assert await asking.state(lease.run) is RunState.AWAITING_APPROVAL

    async def test_an_answered_ask_approves_no_call(self, asking):
        lease, pending = await asked(asking)
        await give(asking, pending)
        lease = await asking.lease(lease.run)
        arguments = {"question": QUESTION, "schema": SCHEMA}
        for place in ({"step_index": 0, "attempt": 2}, {"step_index": 1}):
            proposal = asking.proposal(
                lease, capability="thing.write", arguments=arguments, ticket_id=pending.ticket_id, **place
            )
            denied = await asking.control_plane.admit(proposal)
            assert (type(denied), denied.reason) == (Denied, Reason.APPROVAL_MISMATCH)

    async def test_no_capability_can_be_called_as_an_ask_is(self, asking):
        lease = await asking.lease()
        denied = await asking.control_plane.admit(asking.proposal(lease, capability="provide_input"))
        assert denied.reason is Reason.CAPABILITY_UNKNOWN


class TestRefused:
    """An agent asks where the policy lets it, so often, while it is active; a refusal is a refused step."""

    async def refused(self, bench, lease=None, **changes):
        lease = lease or await bench.lease()
        denied = await bench.control_plane.ask(question(bench, lease, **changes))
        assert isinstance(denied, Denied), denied
        step = (await steps_of(bench, lease.run))[-1]
        assert (step.state, step.error["reason"], step.ticket_id) == (StepState.DENIED, denied.reason, None)
        assert (await bench.kinds(lease.run))[-1] == "step_denied"
        assert await bench.state(lease.run) is RunState.RUNNING
        return denied

    async def test_where_the_policy_says_nothing(self, bench):
        denied = await self.refused(bench)
        assert (denied.reason, denied.rule) == (Reason.INPUT_NOT_ALLOWED, "approval.input")

    async def test_beyond_the_number_that_it_allows_a_run(self, bench):
        asking = under(bench, max_per_run=2)
        lease = await asking.lease()
        for index in range(2):
            _, pending = await asked(asking, lease, step_index=index)
            await give(asking, pending)
            lease = await asking.lease(lease.run)
        denied = await self.refused(asking, lease, step_index=2)
        assert (denied.reason, denied.rule) == (Reason.INPUT_NOT_ALLOWED, "approval.input.max_per_run")
        await asked(asking)  # of another run

    async def test_an_agent_that_is_not_registered(self, asking):
        plane = asking.control_plane
        lease = await asking.lease()
        registered = replace(
            asking,
            control_plane=ControlPlane(
                policy=plane.policy, registry=plane.registry, storage=plane.storage, agents=AgentRegistry([])
            ),
        )
        assert (await self.refused(registered, lease)).reason is Reason.AGENT_INACTIVE

    async def test_after_the_end_of_its_delegation(self, asking):
        over = await asking.storage.runs.now() - timedelta(seconds=1)
        lease = await asking.lease()
        denied = await self.refused(asking, lease, principal=replace(lease.run.principal, expires_at=over))
        assert denied.reason is Reason.DELEGATION_EXPIRED

    async def test_who_lost_the_run_asks_nothing(self, asking):
        lease = await asking.lease()
        asking.let_lease_expire(lease.run)
        with pytest.raises(FencingLost):
            await asking.control_plane.ask(question(asking, lease))
        assert await steps_of(asking, lease.run) == []


class TestAgain:
    """A lost reply is asked for again."""

    async def test_the_same_ask_answers_the_same(self, asking):
        lease, pending = await asked(asking)
        assert await asking.control_plane.ask(question(asking, lease)) == pending
        await give(asking, pending)
        assert await asking.control_plane.ask(question(asking, lease)) == pending
        assert len(asking.behind.rows("approval_tickets")) == 1

    async def test_so_does_a_refused_one(self, bench):
        lease = await bench.lease()
        first = await bench.control_plane.ask(question(bench, lease))
        assert await bench.control_plane.ask(question(bench, lease)) == first
        assert (await bench.kinds(lease.run)).count("step_denied") == 1

    @pytest.mark.parametrize("changes", [{"question": "Another?"}, {"schema": {}}, {"step_id": "other"}])
    async def test_another_one_at_its_place_is_refused(self, asking, changes):
        lease, _ = await asked(asking)
        with pytest.raises(IdempotencyConflict):
            await asking.control_plane.ask(question(asking, lease, **changes))

    async def test_a_refused_step_may_ask_again_and_the_new_ticket_takes_the_place_of_the_old(self, asking):
        lease, first = await asked(asking)
        await asking.decide(first, DENY)
        _, second = await asked(asking, await asking.lease(lease.run), attempt=2)
        assert (await ticket_of(asking, second)).supersedes == first.ticket_id
        assert (await ticket_of(asking, first)).state is TicketState.DENIED


class TestStopped:
    """Halts and cancels."""

    @pytest.mark.parametrize("scope", [HaltScope.RUN, HaltScope.AGENT, HaltScope.RUN_GROUP, HaltScope.TENANT])
    async def test_under_a_halt_nobody_is_asked(self, asking, scope):
        lease = await asking.lease()
        await asking.halt_over(scope, lease.run)
        denied = await asking.control_plane.ask(question(asking, lease))
        assert (denied.reason, denied.rule) == (Reason.HALTED, "halt")
        assert await steps_of(asking, lease.run) == []

    async def test_an_input_under_a_halt_is_kept_and_the_run_goes_on_after_it(self, asking):
        lease, pending = await asked(asking)
        halt = await asking.halt(HaltScope.TENANT)
        await give(asking, pending)
        assert await asking.storage.runs.take(asking.tenant, lease.run.id, owner="w", seconds=60) is None
        assert await asking.state(lease.run) is RunState.HALTED
        await asking.control_plane.lift(asking.tenant, halt.id, by=asking.approver)
        await asking.lease(lease.run)
        (step,) = await steps_of(asking, lease.run)
        assert step.output == {"count": 3}

    async def test_cancelling_the_run_cancels_its_ask(self, asking):
        lease, pending = await asked(asking)
        await asking.control_plane.cancel(asking.tenant, lease.run.id, by=asking.requester)
        assert (await ticket_of(asking, pending)).state is TicketState.CANCELLED
        with pytest.raises(Conflict, match="already cancelled"):
            await give(asking, pending)
        (step,) = await steps_of(asking, lease.run)
        assert (step.state, step.output) == (StepState.CANCELLED, None)

    async def test_a_run_that_is_being_cancelled_asks_nobody(self, asking):
        lease = await asking.lease()
        await asking.control_plane.cancel(asking.tenant, lease.run.id, by=asking.requester)
        denied = await asking.control_plane.ask(question(asking, lease))
        assert denied.reason is Reason.CANCEL_REQUESTED
        assert await steps_of(asking, lease.run) == []

    async def test_an_activation_meanwhile_books_nothing(self, asking, bench, make_policy):
        lease = await asking.lease()
        other = make_policy(version="other")
        by = replace(asking.approver, scopes=frozenset({"plm.policy.activate"}))
        await bench.control_plane.activate_policy(asking.tenant, other, previous=None, reason="x", by=by)
        denied = await asking.control_plane.ask(question(asking, lease))
        assert denied.reason is Reason.POLICY_CHANGED
        assert await steps_of(asking, lease.run) == []


async def test_everybody_may_comment_who_may_answer_or_asked(asking):
    _, pending = await asked(asking)
    for who in (asking.approver, asking.requester):
        await asking.control_plane.approvals.comment(asking.tenant, pending.ticket_id, "well", author=who)
    stranger = replace(asking.approver, user_id=uuid.uuid4(), scopes=frozenset())
    with pytest.raises(Forbidden):
        await asking.control_plane.approvals.comment(asking.tenant, pending.ticket_id, "well", author=stranger)


class TestRecord:
    """What happened is told from the events alone, and why."""

    async def test_events_rebuild_to_the_tables(self, asking):
        for ends in ("given", "denied", "expired", "cancelled", "pending", "refused"):
            lease, pending = await asked(asking)
            match ends:
                case "given":
                    await give(asking, pending)
                case "denied":
                    await asking.decide(pending, DENY, comment="no")
                case "expired":
                    asking.let_deadline_pass(pending)
                    await asking.storage.runs.revive(asking.tenant, lease.run.id, patience_seconds=60)
                case "cancelled":
                    await asking.control_plane.cancel(asking.tenant, lease.run.id, by=asking.requester)
                case "refused":
                    await asking.decide(pending, DENY)
                    lease = await asking.lease(lease.run)
                    silent = asking.with_policy()
                    await silent.control_plane.ask(question(asking, lease, attempt=2))
        _, differences = await rebuild(asking.storage, asking.tenant)
        assert differences == []
        verified = await asking.control_plane.verify_events(asking.tenant)
        assert all(each.consistent for each in verified)

    async def test_as_of_shows_the_run_before_and_after_the_answer(self, asking):
        lease, pending = await asked(asking)
        seq = (await last_event(asking, lease.run)).seq
        await give(asking, pending)
        before = await as_of(asking.storage, asking.tenant, lease.run.id, seq)
        after = await as_of(asking.storage, asking.tenant, lease.run.id, seq + 1)
        assert (before.run.state, before.run.reason) == (RunState.AWAITING_APPROVAL, "input_required")
        assert before.tickets[pending.ticket_id].state is TicketState.PENDING
        assert after.run.state is RunState.QUEUED
        assert after.tickets[pending.ticket_id].decided_by == asking.approver.user_id

    async def test_why_says_what_is_asked_and_what_was_given(self, asking):
        lease, pending = await asked(asking)
        why = await asking.control_plane.why(asking.tenant, str(lease.run.id))
        assert (why.state, why.reason) == ("awaiting_approval", "input_required")
        assert why.unblocked_by == "an input by a person with plm.hitl.resolve within 3600 s"
        assert QUESTION in why.because.because.message
        assert why.because.stage == "approval"
        await give(asking, pending)
        why = await asking.control_plane.why(asking.tenant, str(pending.ticket_id))
        assert why.message == f'given by {asking.approver.user_id}; the input is {{"count":3}}'
        assert (why.state, why.rule, why.unblocked_by) == ("approved", "approval.input", "")

    async def test_why_says_why_a_step_was_refused(self, asking):
        lease, pending = await asked(asking)
        await asking.decide(pending, DENY, comment="no")
        why = await asking.control_plane.why(asking.tenant, f"{lease.run.id}/0/1")
        assert (why.reason, why.message, why.stage) == ("input_denied", "no input was given: no", "approval")
        assert why.unblocked_by == "going on without the input, or a new run"

    async def test_an_ask_is_no_proposal_to_be_decided_again(self, asking):
        since = await asking.storage.runs.now()
        lease, pending = await asked(asking)
        await give(asking, pending)
        await asking.grant(await asking.lease(lease.run), step_index=1)
        found = [each async for batch in asking.storage.runs.attempts(asking.tenant, since=since) for each in batch]
        assert [each.capability for each in found] == ["thing.read"]
        earlier = await asking.storage.admission.history(asking.tenant, lease.run.id, beside=(9, 1), limit=9)
        assert earlier == ([(1, "thing.read")], 0), "an ask is no risk of the run"


def test_a_policy_that_lets_nobody_ask_is_written_as_before_there_were_asks(make_policy):
    silent, telling = make_policy(), make_policy(approval={"input": {}})
    assert "input" not in json.loads(silent.content)["approval"]
    assert read_policy(telling.content, source="it") == telling
    assert silent.digest != telling.digest


def deep(levels):
    return {"items": deep(levels - 1)} if levels else {}


class TestBounds:
    """Question, schema and input are bounded; what is refused is named and never repeated."""

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"question": ""}, "question"),
            ({"question": "  "}, "question"),
            ({"question": "x" * (LONGEST_QUESTION + 1)}, "question"),
            ({"question": "a\0"}, "question"),
            ({"question": "\ud800"}, "question"),
            ({"question": 7}, "question"),
            ({"schema": "string"}, "schema"),
            ({"schema": True}, "schema"),
            ({"schema": {"type": "strange"}}, "schema"),
            ({"schema": {"pattern": "("}}, "schema"),
            ({"schema": {"$ref": "#"}}, "schema"),
            ({"schema": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {}}}}, "schema"),
            ({"schema": {"$ref": "http://127.0.0.1/schema"}}, "schema"),
            ({"schema": {"$dynamicRef": "#a"}}, "schema"),
            ({"schema": {"allOf": [{"unevaluatedItems": {}}]}}, "schema"),
            ({"schema": {"properties": {"a": {"unevaluatedProperties": False}}}}, "schema"),
            ({"schema": {"description": "x" * LARGEST_SCHEMA}}, "schema"),
            ({"schema": {"enum": [0] * MOST_IN_SCHEMA}}, "schema"),
            ({"schema": {"const": float("nan")}}, "schema.const"),
            ({"schema": deep(600)}, None),
            ({"step_id": ""}, "step_id"),
        ],
        ids=range(21),
    )
    async def test_what_cannot_be_asked_is_refused_by_its_name(self, asking, changes, field):
        lease = await asking.lease()
        with pytest.raises(InvalidRequest) as caught:
            await asking.control_plane.ask(question(asking, lease, **changes))
        assert caught.value.field == field or field is None
        assert await steps_of(asking, lease.run) == []

    @pytest.mark.parametrize(
        ("value", "path"),
        [
            ({"count": 0}, "input.count"),
            ({"count": "hunter2"}, "input.count"),
            ({"count": 1, "note": ["hunter2"]}, "input.note"),
            ({}, "input"),
            ({"count": 1, "hunter2": "hunter2"}, "input"),
            ("hunter2", "input"),
            ({"count": float("nan")}, "input.count"),
            ({"count": 1, "note": "hunter2\0"}, "input.note"),
            ({"count": 1, "note": "hunter2" * LARGEST_INPUT}, "input"),
            ([0] * MOST_IN_INPUT, "input"),
        ],
        ids=range(10),
    )
    async def test_what_is_no_answer_is_refused_by_its_path_and_not_repeated(self, asking, value, path):
        lease, pending = await asked(asking)
        with pytest.raises(InvalidRequest) as caught:
            await give(asking, pending, value)
        assert caught.value.field == path
        assert "hunter2" not in str(caught.value)
        assert await asking.state(lease.run) is RunState.AWAITING_APPROVAL
        assert (await give(asking, pending)).input == {"count": 3}, "it may be given again"

    @pytest.mark.parametrize(
        ("schema", "value", "taken"),
        [
            ({"items": {"allOf": [{"type": "integer"}] * 90}}, [1] * 299, True),
            ({"oneOf": [{"uniqueItems": True}] * 90}, [{"a": n} for n in range(140)], False),
            ({"pattern": "^(a+)+$"}, "a" * 5000 + "b", False),
            ({"patternProperties": {"^(a|a)*$": False}}, {"a" * 5000 + "b": 1}, True),
            (
                {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False},
                {"a" * 5000 + "!": 1},
                False,
            ),
            ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": {}}, {"a" * 5000 + "!": 1}, True),
            ({"multipleOf": 1e-300}, 10**300, None),
        ],
        ids=range(7),
    )
    def test_no_schema_keeps_the_one_who_answers_waiting(self, schema, value, taken):
        """One that could be made to take exponential time would not come back from here."""
        asked = check_ask(QUESTION, schema)
        try:
            check_input(value, asked)
            answer = True
        except InvalidRequest:
            answer = False
        assert answer is taken or taken is None, "None: either, but no other error"
