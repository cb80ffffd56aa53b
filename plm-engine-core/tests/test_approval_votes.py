"""Approvals by several: quorum, authority by tier and risk, comments, hand-over in time, and approval scopes."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core.control_plane import Granted, Pending
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.hitl import ScopeTerms, ticket_revision
from plm_engine_core.control_plane.policy import ApprovalRule
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    HaltScope,
    Reason,
    RiskLevel,
    RunState,
    TicketDecision,
    TicketState,
)

pytestmark = pytest.mark.every_storage

APPROVE, DENY = TicketDecision.APPROVE, TicketDecision.DENY
STANDING = {"max_uses": 5, "max_seconds": 600, "max_risk": "high"}


def somebody(bench, *scopes):
    """Another person, with the rights of the approver and these."""
    return replace(bench.approver, user_id=uuid.uuid4(), scopes=bench.approver.scopes | set(scopes))


async def ticket_of(bench, pending):
    return await bench.storage.approvals.get(bench.tenant, pending.ticket_id)


def test_of_all_that_applies_to_a_call_the_strictest_counts():
    rule = ApprovalRule.model_validate(
        {
            "timeout_seconds": 600,
            "by_tier": {"always_approve": {"quorum": 2, "required_scope": "plm.hitl.always"}},
            "by_risk": {"high": {"quorum": 3, "required_scope": "plm.hitl.high", "timeout_seconds": 60}},
        }
    )
    plain = rule.demand(ActionTier.AUTO_APPROVE, RiskLevel.LOW)
    assert (plain.scopes, plain.quorum, plain.timeout_seconds) == (("plm.hitl.resolve",), 1, 600)
    high = rule.demand(ActionTier.ALWAYS_APPROVE, RiskLevel.HIGH)
    assert high.scopes == ("plm.hitl.resolve", "plm.hitl.always", "plm.hitl.high")
    assert (high.quorum, high.timeout_seconds) == (3, 60)


def test_a_policy_that_says_nothing_new_of_approvals_keeps_its_digest(make_policy):
    plain = make_policy(approval={"timeout_seconds": 600})
    assert make_policy(approval={"timeout_seconds": 600, "quorum": 1, "by_risk": {}}).digest == plain.digest
    said = [{"quorum": 2}, {"by_risk": {"high": {"quorum": 2}}}, {"escalation": {"required_scope": "x"}}]
    said += [{"standing": STANDING}, {"by_tier": {"always_approve": {"required_scope": "x"}}}]
    assert len({plain.digest, *(make_policy(approval={"timeout_seconds": 600, **each}).digest for each in said)}) == 6


class TestAsRead:
    """Who decides may say what they have read: nothing else is decided then."""

    @pytest.fixture
    def bench(self, bench):
        escalation = {"required_scope": "plm.hitl.duty", "timeout_seconds": 900}
        return bench.with_policy(approval={"quorum": 2, "escalation": escalation})

    async def read(self, bench, pending):
        store = bench.storage.approvals
        votes, comments = (
            await store.votes(bench.tenant, pending.ticket_id),
            await store.comments(bench.tenant, pending.ticket_id),
        )
        return ticket_revision(await ticket_of(bench, pending), votes, comments)

    async def comment(self, bench, pending):
        await bench.control_plane.approvals.comment(bench.tenant, pending.ticket_id, "x", author=bench.approver)

    async def vote(self, bench, pending):
        await bench.decide(pending, APPROVE, approver=somebody(bench))

    async def hand_on(self, bench, pending):
        bench.let_deadline_pass(pending)
        await Recovery(bench.storage).sweep()

    @pytest.mark.parametrize("change", ["comment", "vote", "hand_on"])
    async def test_what_was_changed_since_is_not_decided(self, bench, change):
        lease, pending = await bench.ask()
        read, who = await self.read(bench, pending), somebody(bench, "plm.hitl.duty")
        await getattr(self, change)(bench, pending)
        kinds = await bench.kinds(lease.run)
        for decision in (APPROVE, DENY):
            with pytest.raises(Conflict) as caught:
                await bench.decide(pending, decision, approver=who, as_read=read)
            assert caught.value.reason == "changed_meanwhile"
        assert await bench.kinds(lease.run) == kinds
        assert await self.read(bench, pending) != read
        decided = await bench.decide(pending, DENY, approver=who, as_read=await self.read(bench, pending))
        assert decided.state is TicketState.DENIED

    async def test_the_same_vote_again_is_answered_although_it_has_changed_the_ticket_itself(self, bench):
        _, pending = await bench.ask()
        read = await self.read(bench, pending)
        first = await bench.decide(pending, APPROVE, as_read=read)
        assert await bench.decide(pending, APPROVE, as_read=read) == first
        assert await self.read(bench, pending) != read

    async def test_of_many_who_have_read_the_same_one_is_counted(self, bench):
        _, pending = await bench.ask()
        read = await self.read(bench, pending)
        votes = [bench.decide(pending, APPROVE, approver=somebody(bench), as_read=read) for _ in range(8)]
        answers = await asyncio.gather(*votes, return_exceptions=True)
        refused = [each.reason for each in answers if isinstance(each, Conflict)]
        assert refused == ["changed_meanwhile"] * 7
        assert len(await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)) == 1

    async def test_what_is_over_is_said_to_be_over(self, bench):
        _, pending = await bench.ask()
        read = await self.read(bench, pending)
        await bench.decide(pending, DENY, approver=somebody(bench))
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, APPROVE, as_read=read)
        assert caught.value.reason == "already_decided"

    @pytest.mark.parametrize("read", ["", "pending-0-0-0-1", "*", "x" * 300])
    async def test_what_nobody_can_have_read_decides_nothing(self, bench, read):
        _, pending = await bench.ask()
        with pytest.raises(Conflict):
            await bench.decide(pending, APPROVE, as_read=read)

    @pytest.mark.parametrize(
        "read", [1, b"pending-0-0-0-0", ["pending-0-0-0-0"], "\x00"], ids=["number", "bytes", "list", "nul"]
    )
    async def test_what_is_no_revision_is_refused_by_name(self, bench, read):
        _, pending = await bench.ask()
        with pytest.raises(InvalidRequest) as caught:
            await bench.decide(pending, APPROVE, as_read=read)
        assert caught.value.field.startswith("as_read")


class TestQuorum:
    """N different people; one denial ends it."""

    @pytest.fixture
    def bench(self, bench):
        return bench.with_policy(approval={"by_risk": {"high": {"quorum": 3}}})

    async def test_a_call_goes_on_when_so_many_different_people_approved(self, bench):
        lease, pending = await bench.ask()
        people = [somebody(bench) for _ in range(3)]
        for who in people[:2]:
            ticket = await bench.decide(pending, APPROVE, approver=who)
            assert (ticket.state, await bench.state(lease.run)) == (TicketState.PENDING, RunState.AWAITING_APPROVAL)
        before = bench.deliveries(lease.run)
        assert (await bench.decide(pending, APPROVE, approver=people[2])).state is TicketState.APPROVED
        assert (await bench.state(lease.run), bench.deliveries(lease.run)) == (RunState.QUEUED, before + 1)
        votes = await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)
        assert [vote.voter for vote in votes] == [who.user_id for who in people]
        kinds = await bench.kinds(lease.run)
        assert kinds[-3:] == ["approval_voted", "approval_voted", "approval_decided"]

    async def test_one_denial_ends_it(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE, approver=somebody(bench))
        assert (await bench.decide(pending, DENY, approver=somebody(bench))).state is TicketState.DENIED
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, APPROVE, approver=somebody(bench))
        assert caught.value.reason == "already_decided"

    async def test_the_same_person_counts_once_and_is_answered_the_same(self, bench):
        lease, pending = await bench.ask()
        first = await bench.decide(pending, APPROVE)
        kinds = await bench.kinds(lease.run)
        assert [await bench.decide(pending, APPROVE) for _ in range(3)] == [first] * 3
        assert await bench.kinds(lease.run) == kinds
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, DENY)
        assert caught.value.reason == "already_voted"

    async def test_many_at_once_are_counted_exactly(self, bench):
        _, pending = await bench.ask()
        people = [somebody(bench) for _ in range(8)]
        answers = await asyncio.gather(
            *(bench.decide(pending, APPROVE, approver=who) for who in (*people, *people)), return_exceptions=True
        )
        votes = await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)
        assert len(votes) == 3
        refused = [each for each in answers if isinstance(each, BaseException)]
        assert {(type(each), each.reason) for each in refused} == {(Conflict, "already_decided")}
        assert len(refused) == 10, "five people twice; those who were counted were answered twice"

    async def test_an_expired_ticket_counts_no_vote(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE, approver=somebody(bench))
        bench.let_deadline_pass(pending)
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, APPROVE, approver=somebody(bench))
        assert caught.value.reason == "approval_expired"
        assert len(await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)) == 1


class TestAuthority:
    """Asked by tier and risk, when the decision is made."""

    @pytest.fixture
    def bench(self, bench):
        return bench.with_policy(
            approval={
                "by_risk": {"high": {"required_scope": "plm.hitl.high"}},
                "by_tier": {"always_approve": {"required_scope": "plm.hitl.always"}},
            }
        )

    async def test_what_is_missing_is_named_and_nothing_is_counted(self, bench):
        _, pending = await bench.ask()
        for scopes, missing in (
            ((), ("plm.hitl.always", "plm.hitl.high")),
            (("plm.hitl.always",), ("plm.hitl.high",)),
        ):
            with pytest.raises(Forbidden) as caught:
                await bench.decide(pending, APPROVE, approver=somebody(bench, *scopes))
            assert caught.value.missing_scopes == missing
        assert await bench.storage.approvals.votes(bench.tenant, pending.ticket_id) == []

    async def test_what_was_asked_stands_in_the_vote(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE, approver=somebody(bench, "plm.hitl.high", "plm.hitl.always"))
        (vote,) = await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)
        assert vote.authority == ("plm.hitl.resolve", "plm.hitl.always", "plm.hitl.high")

    async def test_a_policy_that_became_stricter_meanwhile_counts(self, bench):
        _, pending = await bench.ask()
        stricter = bench.with_policy(approval={"required_scope": "plm.hitl.board"})
        with pytest.raises(Forbidden) as caught:
            await stricter.decide(pending, APPROVE, approver=somebody(bench, "plm.hitl.high", "plm.hitl.always"))
        assert caught.value.missing_scopes == ("plm.hitl.board",)

    async def test_who_had_it_asked_for_by_delegation_decides_nothing(self, bench):
        chief = somebody(bench, "plm.hitl.high", "plm.hitl.always")
        delegate = replace(bench.requester, user_id=uuid.uuid4(), delegated_by=(uuid.uuid4(), chief.user_id))
        lease = await bench.lease(await bench.run(principal=delegate))
        _, pending = await bench.ask(lease)
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE, approver=chief)
        assert caught.value.reason == "separation_of_duties"


class TestHandingOn:
    """Time-out by rule: denied, or handed on once to a wider circle."""

    @pytest.fixture
    def bench(self, bench):
        return bench.with_policy(approval={"escalation": {"required_scope": "plm.hitl.duty", "timeout_seconds": 900}})

    @pytest.fixture
    async def handed_on(self, bench):
        lease, pending = await bench.ask()
        bench.let_deadline_pass(pending)
        return lease, pending

    async def test_a_sweep_hands_it_on_with_a_new_deadline_and_the_run_stays_parked(self, bench, handed_on):
        lease, pending = handed_on
        for _ in range(3):
            await Recovery(bench.storage).sweep()
        ticket = await ticket_of(bench, pending)
        assert ticket.state is TicketState.PENDING
        assert ticket.escalated_at is not None
        assert (ticket.deadline - ticket.escalated_at).total_seconds() == pytest.approx(900, abs=1)
        assert await bench.state(lease.run) is RunState.AWAITING_APPROVAL
        assert (await bench.kinds(lease.run)).count("approval_escalated") == 1

    async def test_then_the_wider_circle_decides_and_nobody_else(self, bench, handed_on):
        _, pending = handed_on
        await Recovery(bench.storage).sweep()
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE)
        assert caught.value.missing_scopes == ("plm.hitl.duty",)
        decided = await bench.decide(pending, APPROVE, approver=somebody(bench, "plm.hitl.duty"))
        assert decided.state is TicketState.APPROVED

    async def test_who_decides_just_when_it_is_handed_on_is_told_so(self, bench, handed_on):
        _, pending = handed_on
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, APPROVE)
        assert caught.value.reason == "escalated"
        assert (await ticket_of(bench, pending)).escalated_at is not None

    async def test_an_approval_from_before_counts_once_its_voter_gives_it_with_the_new_authority(self, bench):
        """Quorum is of people who hold what the ticket needs when it is decided, not of who once sufficed."""
        escalation = {"required_scope": "plm.hitl.duty", "timeout_seconds": 900}
        bench = bench.with_policy(approval={"quorum": 2, "escalation": escalation})
        lease, pending = await bench.ask()
        plain = somebody(bench)
        await bench.decide(pending, APPROVE, approver=plain)
        bench.let_deadline_pass(pending)
        await Recovery(bench.storage).sweep()
        first = await bench.decide(pending, APPROVE, approver=somebody(bench, "plm.hitl.duty"))
        assert first.state is TicketState.PENDING, "one of two with the wider circle's authority"
        with pytest.raises(Forbidden):
            await bench.decide(pending, APPROVE, approver=plain)
        trained = replace(plain, scopes=plain.scopes | {"plm.hitl.duty"})
        decided = await bench.decide(pending, APPROVE, approver=trained, comment="again")
        assert decided.state is TicketState.APPROVED
        votes = await bench.storage.approvals.votes(bench.tenant, pending.ticket_id)
        assert {each.authority for each in votes} == {("plm.hitl.duty",)}
        assert len(votes) == 2
        assert (await bench.decide(pending, APPROVE, approver=trained)).decided_by == plain.user_id
        told = [each.data for each in await bench.storage.events.read(bench.tenant, run_stream(lease.run.id))]
        assert [each["votes"] for each in told if "votes" in each] == [1, 1, 2]

    async def test_who_approved_before_may_not_deny_afterwards(self, bench):
        escalation = {"required_scope": "plm.hitl.duty", "timeout_seconds": 900}
        bench = bench.with_policy(approval={"quorum": 2, "escalation": escalation})
        _, pending = await bench.ask()
        voter = somebody(bench, "plm.hitl.duty")
        await bench.decide(pending, APPROVE, approver=voter)
        bench.let_deadline_pass(pending)
        await Recovery(bench.storage).sweep()
        with pytest.raises(Conflict) as caught:
            await bench.decide(pending, DENY, approver=voter)
        assert caught.value.reason == "already_voted"

    @pytest.mark.parametrize("change", ["vote = 'approve'", "voter = gen_random_uuid()", "ticket_id = ticket_id"])
    @pytest.mark.postgres_only
    def test_the_application_cannot_make_another_vote_of_one(self, bench, change):
        with (
            psycopg.connect(bench.database.app) as app,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            app.execute(f"UPDATE approval_votes SET {change}".encode())  # noqa: S608  # a literal of these tests

    async def test_the_second_deadline_is_the_last(self, bench, handed_on):
        lease, pending = handed_on
        await Recovery(bench.storage).sweep()
        bench.let_deadline_pass(pending)
        await Recovery(bench.storage).sweep()
        assert (await ticket_of(bench, pending)).state is TicketState.EXPIRED
        assert await bench.state(lease.run) is RunState.QUEUED


class TestComments:
    """Append-only, by those concerned."""

    async def test_they_stand_in_their_order_and_decide_nothing(self, bench):
        lease, pending = await bench.ask()
        gate = bench.control_plane.approvals
        for author, body in ((bench.approver, "why?"), (bench.requester, "because")):
            await gate.comment(bench.tenant, pending.ticket_id, body, author=author)
        found = await bench.storage.approvals.comments(bench.tenant, pending.ticket_id)
        assert [(each.author, each.body) for each in found] == [
            (bench.approver.user_id, "why?"),
            (bench.requester.user_id, "because"),
        ]
        assert (await ticket_of(bench, pending)).state is TicketState.PENDING
        assert (await bench.kinds(lease.run))[-2:] == ["approval_commented"] * 2

    async def test_a_decided_ticket_can_still_be_commented(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, DENY)
        await bench.control_plane.approvals.comment(bench.tenant, pending.ticket_id, "noted", author=bench.approver)

    async def test_nobody_else_may_and_none_is_empty_or_endless(self, bench):
        _, pending = await bench.ask()
        gate = bench.control_plane.approvals
        stranger = replace(bench.approver, user_id=uuid.uuid4(), scopes=frozenset())
        with pytest.raises(Forbidden):
            await gate.comment(bench.tenant, pending.ticket_id, "me too", author=stranger)
        for body in (" ", "x" * 10_001):
            with pytest.raises(InvalidRequest):
                await gate.comment(bench.tenant, pending.ticket_id, body, author=bench.approver)
        with pytest.raises(NotFound):
            await gate.comment(bench.tenant, uuid.uuid4(), "x", author=bench.approver)

    @pytest.mark.parametrize("statement", ["UPDATE approval_comments SET body = 'x'", "DELETE FROM approval_comments"])
    @pytest.mark.postgres_only
    def test_the_application_cannot_change_one(self, bench, statement):
        with (
            psycopg.connect(bench.database.app) as app,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            app.execute(statement.encode())


async def test_a_waiter_never_changes_a_ticket(bench):
    _, pending = await bench.ask()
    before = await ticket_of(bench, pending)
    gate = bench.control_plane.approvals
    assert await gate.wait(bench.tenant, pending.ticket_id, seconds=0) == before
    waiting = asyncio.create_task(gate.wait(bench.tenant, pending.ticket_id, seconds=600))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await ticket_of(bench, pending) == before
    waiting = asyncio.create_task(gate.wait(bench.tenant, pending.ticket_id, seconds=600))
    decided = await bench.decide(pending, APPROVE)
    assert await waiting == decided
    with pytest.raises(InvalidRequest):
        await gate.wait(bench.tenant, pending.ticket_id, seconds=-1)


class TestScopesOffered:
    """Approval scopes come of approvals, inside what the policy allows."""

    @pytest.fixture
    def bench(self, bench):
        return bench.with_policy(approval={"standing": STANDING})

    async def scopes(self, bench):
        return await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None)

    async def test_an_approval_leaves_one_behind_that_is_bound_to_the_call(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=3, seconds=60))
        (scope,) = await self.scopes(bench)
        assert (scope.capability, scope.resource, scope.agent) == ("thing.write", "thing/1", "test")
        assert (scope.requested_by, scope.granted_by) == (bench.requester.user_id, bench.approver.user_id)
        assert (scope.max_uses, scope.used, scope.policy_digest) == (3, 0, bench.control_plane.policy.digest)

    @pytest.mark.parametrize(
        "terms",
        [
            ScopeTerms(uses=6, seconds=60),
            ScopeTerms(uses=1, seconds=601),
            ScopeTerms(uses=1, seconds=60, any_resource=True),
        ],
        ids=["uses", "time", "resource"],
    )
    async def test_wider_than_the_policy_allows_is_refused_and_nothing_is_counted(self, bench, terms):
        _, pending = await bench.ask()
        with pytest.raises(Forbidden) as caught:
            await bench.decide(pending, APPROVE, scope=terms)
        assert caught.value.reason == "scope_not_allowed"
        assert (await ticket_of(bench, pending)).state is TicketState.PENDING

    @pytest.mark.parametrize("approval", [{}, {"standing": {**STANDING, "max_risk": "medium"}}], ids=["none", "risk"])
    async def test_a_policy_that_allows_none_for_the_ticket_refuses_it(self, bench, approval):
        bench = bench.with_policy(approval=approval)
        _, pending = await bench.ask()
        with pytest.raises(Forbidden):
            await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=1, seconds=1))

    @pytest.mark.parametrize("terms", [(0, 1), (-1, 1), (1, 0), (1, float("inf")), (1, float("nan"))])
    async def test_terms_are_positive_numbers_and_go_with_an_approval(self, bench, terms):
        _, pending = await bench.ask()
        uses, seconds = terms
        with pytest.raises(InvalidRequest):
            await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=uses, seconds=seconds))
        with pytest.raises(InvalidRequest):
            await bench.decide(pending, DENY, scope=ScopeTerms(uses=1, seconds=1))

    async def test_of_several_approvers_the_narrowest_terms_count_and_only_if_all_offer_some(self, bench):
        bench = bench.with_policy(approval={"quorum": 2, "standing": {**STANDING, "any_resource": True}})
        offers = (ScopeTerms(uses=4, seconds=500, any_resource=True), ScopeTerms(uses=2, seconds=600))
        for number, pair in enumerate((offers, (offers[0], None)), start=1):
            _, pending = await bench.ask(resource=f"thing/{number}")
            for offer in pair:
                await bench.decide(pending, APPROVE, approver=somebody(bench), scope=offer)
        (scope,) = await self.scopes(bench)
        assert (scope.max_uses, scope.resource) == (2, "thing/1")
        assert (scope.expires_at - scope.created_at).total_seconds() == pytest.approx(500, abs=1)

    async def test_it_can_be_revoked_twice_and_is_an_event(self, bench):
        _, pending = await bench.ask()
        await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=3, seconds=60))
        (scope,) = await self.scopes(bench)
        gate = bench.control_plane.approvals
        first, second = [await gate.revoke_scope(bench.tenant, scope.id, by=bench.approver) for _ in range(2)]
        assert first == second
        assert first.revoked_by == bench.approver.user_id
        events = await bench.storage.events.read(bench.tenant, "tenant")
        assert [event.kind for event in events] == ["approval_scope_revoked"]
        for nobody in (replace(bench.approver, scopes=frozenset()), replace(bench.approver, actor_kind="agent")):
            with pytest.raises(Forbidden):
                await gate.revoke_scope(bench.tenant, scope.id, by=nobody)
        with pytest.raises(NotFound):
            await gate.revoke_scope(bench.tenant, uuid.uuid4(), by=bench.approver)

    async def test_they_are_listed_page_by_page(self, bench):
        for number in range(3):
            _, pending = await bench.ask(resource=f"thing/{number}")
            await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=3, seconds=60))
        everything, after = await self.scopes(bench), None
        for expected in itertools.chain(([each] for each in everything), [[]]):
            page = await bench.storage.approvals.scopes(bench.tenant, limit=1, after=after)
            assert page == expected
            after = (page[-1].created_at, page[-1].id) if page else None


class TestScopesUsed:
    """A covered call is granted without a human, under the lock of its approval scope; nothing else is covered."""

    @pytest.fixture
    def bench(self, bench):
        return bench.with_policy(approval={"standing": {**STANDING, "any_resource": True}})

    async def standing(self, bench, *, lease=None, **terms):
        lease, pending = await bench.ask(lease)
        offer = ScopeTerms(**{"uses": 2, "seconds": 60, **terms})
        await bench.decide(pending, APPROVE, scope=offer)
        return (await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None))[-1]

    async def admitted(self, bench, lease=None, **changes):
        lease = lease or await bench.lease()
        return await bench.control_plane.admit(bench.proposal(lease, **{"capability": "thing.write", **changes}))

    async def used(self, bench, scope):
        found = await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None)
        return next(each.used for each in found if each.id == scope.id)

    async def test_so_many_calls_are_granted_and_the_next_one_asks(self, bench):
        scope = await self.standing(bench)
        for number in (1, 2):
            lease = await bench.lease()
            assert isinstance(await self.admitted(bench, lease, arguments={"name": "another"}), Granted)
            assert await self.used(bench, scope) == number
            (event,) = [
                each
                for each in await bench.storage.events.read(bench.tenant, f"run/{lease.run.id}")
                if each.kind == "step_granted"
            ]
            assert event.data["answer"]["approval_scope_id"] == str(scope.id)
        assert isinstance(await self.admitted(bench), Pending)

    async def test_at_once_no_use_is_counted_twice(self, bench):
        scope = await self.standing(bench, uses=3)
        leases = [await bench.lease() for _ in range(8)]
        answers = await asyncio.gather(*(self.admitted(bench, lease) for lease in leases))
        assert sum(isinstance(each, Granted) for each in answers) == 3
        assert await self.used(bench, scope) == 3

    @pytest.mark.parametrize("what", ["agent", "requester", "policy", "resource", "capability", "time", "revoked"])
    async def test_what_is_not_the_same_in_everything_asks(self, bench, what):
        scope = await self.standing(bench)
        values, changes = {}, {}
        if what == "agent":
            values["agent"] = {"name": "somebody else", "plan": {}}
        elif what == "requester":
            values["principal"] = somebody(bench)
        elif what == "policy":
            bench = bench.with_policy(version="2")
        elif what == "resource":
            changes["resource"] = "thing/2"
        elif what == "capability":
            bench.behind.set_rows("approval_scopes", {}, capability="thing.other")
        elif what == "time":
            bench.behind.set_time("approval_scopes", "expires_at", 0, {})
        else:
            await bench.control_plane.approvals.revoke_scope(bench.tenant, scope.id, by=bench.approver)
        lease = await bench.lease(await bench.run(**values))
        assert isinstance(await self.admitted(bench, lease, **changes), Pending)
        assert await self.used(bench, scope) == 0

    async def test_the_approver_does_not_approve_their_own_calls_by_it(self, bench):
        await self.standing(bench)
        lease = await bench.lease(await bench.run(principal=bench.approver))
        assert isinstance(await self.admitted(bench, lease), Pending)

    async def test_another_resource_is_covered_where_every_approver_and_the_policy_said_so(self, bench):
        await self.standing(bench, any_resource=True)
        assert isinstance(await self.admitted(bench, resource="thing/2"), Granted)

    async def test_a_higher_risk_or_another_tier_is_not_covered(self, bench):
        await self.standing(bench)
        for change in ({"risk": "medium"}, {"risk": "high", "tier": "auto_approve"}):
            bench.behind.set_rows("approval_scopes", {}, **change)
            assert isinstance(await self.admitted(bench), Pending)

    async def test_a_refused_budget_uses_nothing_up(self, bench):
        scope = await self.standing(bench)
        bench.behind.set_rows("budgets", {"scope_kind": "tenant", "unit": "calls"}, spent=Decimal(1000))
        assert (await self.admitted(bench)).reason is Reason.BUDGET_EXCEEDED
        assert await self.used(bench, scope) == 0

    @pytest.mark.postgres_only
    async def test_one_that_cannot_be_ended_keeps_a_halt_from_ending_nothing_else(self, bench, caplog):
        asked = [(await bench.ask())[1] for _ in range(3)]  # before one of them covers the others
        for pending in asked:
            await bench.decide(pending, APPROVE, scope=ScopeTerms(uses=2, seconds=60))
        scopes = await bench.storage.approvals.scopes(bench.tenant, limit=9, after=None)
        lease = await bench.lease()
        grant = await bench.grant(lease)
        bench.sql(
            f"CREATE FUNCTION damage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = '{scopes[1].id}' THEN "
            "RAISE 'damaged'; END IF; RETURN NEW; END $$"
        )
        bench.sql("CREATE TRIGGER damage BEFORE UPDATE ON approval_scopes FOR EACH ROW EXECUTE FUNCTION damage()")
        halt = await bench.halt(HaltScope.TENANT)
        assert "could not end 1 grants or approval scopes" in caplog.text
        assert bench.sql("SELECT state FROM grants") == [("revoked",)] * len(bench.sql("SELECT id FROM grants"))
        ended = dict(bench.sql("SELECT id, revoked_at IS NOT NULL FROM approval_scopes"))
        assert [ended[each.id] for each in scopes] == [True, False, True]
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert not (await bench.begin(grant, lease)).accepted

    @pytest.mark.parametrize(
        "halted",
        [
            (HaltScope.SYSTEM, None),
            (HaltScope.TENANT, None),
            (HaltScope.AGENT, "test"),
            (HaltScope.CAPABILITY, "thing.write"),
        ],
    )
    async def test_a_halt_ends_it_for_good(self, bench, halted):
        await self.standing(bench)
        lease, (scope, subject) = await bench.lease(), halted
        halt = await bench.halt(scope, subject=subject)
        assert (await self.admitted(bench, lease)).reason is Reason.HALTED
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert isinstance(await self.admitted(bench, lease, attempt=2), Pending)


class TestAnotherCall:
    """Changed arguments need a new ticket, which is linked to the one before."""

    async def again(self, bench, pending, lease, **changes):
        values = {"capability": "thing.write", "attempt": 2, "arguments": {"name": "two"}, **changes}
        admission = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert isinstance(admission, Pending), admission
        return await bench.storage.approvals.get(bench.tenant, admission.ticket_id)

    async def test_a_denied_call_with_other_arguments_is_a_new_linked_ticket(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, DENY)
        new = await self.again(bench, pending, await bench.lease(lease.run))
        old = await ticket_of(bench, pending)
        assert (new.supersedes, old.superseded_by, old.state) == (old.id, new.id, TicketState.DENIED)
        assert new.arguments == {"name": "two"}

    async def test_an_unused_approval_is_worth_nothing_once_another_call_was_asked_for(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, APPROVE)
        lease = await bench.lease(lease.run)
        values = {"capability": "thing.write", "arguments": {"name": "two"}, "ticket_id": pending.ticket_id}
        denied = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert denied.reason is Reason.APPROVAL_MISMATCH
        await self.again(bench, pending, lease)
        await bench.decide(await self.pending(bench, lease), DENY)
        lease = await bench.lease(lease.run)
        values = {"capability": "thing.write", "attempt": 3, "ticket_id": pending.ticket_id}
        denied = await bench.control_plane.admit(bench.proposal(lease, **values))
        assert denied.reason is Reason.APPROVAL_MISMATCH
        assert (await ticket_of(bench, pending)).consumed_at is None

    async def pending(self, bench, lease):
        tickets = await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=TicketState.PENDING)
        return Pending(ticket_id=tickets[-1].id, deadline=tickets[-1].deadline, message="")


async def test_of_thirty_racing_pairs_each_has_one_winner_and_the_loser_is_told(bench):
    asked = [await bench.ask() for _ in range(30)]
    people = (somebody(bench), somebody(bench))

    async def race(pending):
        return await asyncio.gather(
            bench.decide(pending, APPROVE, approver=people[0]),
            bench.decide(pending, DENY, approver=people[1]),
            return_exceptions=True,
        )

    races = await asyncio.gather(*(race(pending) for _, pending in asked))  # all sixty at once
    for (lease, pending), answers in zip(asked, races, strict=True):
        lost = [each for each in answers if isinstance(each, BaseException)]
        assert [(type(each), each.reason) for each in lost] == [(Conflict, "already_decided")]
        won = next(each for each in answers if not isinstance(each, BaseException))
        assert won == await ticket_of(bench, pending)
        assert (await bench.kinds(lease.run)).count("approval_decided") == 1
