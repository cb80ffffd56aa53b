"""A run, its tickets and the halts over it beside a small oracle: whatever is done in whichever order.

Tickets are denied at their deadline or, under another policy, handed on to a wider circle first. System halts are over
a second tenant too.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plm_engine_core.control_plane import (
    ControlPlane,
    Denied,
    Granted,
    InputRequest,
    Outcome,
    Pending,
    Principal,
    Proposal,
    RunRequest,
    SyncControlPlane,
)
from plm_engine_core.control_plane.errors import Conflict, Forbidden
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import (
    HaltScope,
    OutcomeStatus,
    Reason,
    RunState,
    TicketDecision,
    TicketKind,
)

QUORUM = 2
READ, WRITE = "thing.read", "thing.write"
WIDER = "plm.hitl.wider"
SCOPES = frozenset(
    {"plm.runs.create", "plm.hitl.resolve", "plm.halt", "plm.halt.system", "things.read", "things.write"}
)
PEOPLE = [
    Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=SCOPES | ({WIDER} if number < 3 else frozenset()))
    for number in range(4)
]
OUTSIDE = 3  # of those whom a ticket is handed on to
REQUESTER = PEOPLE[0]
HANDED_ON = {"escalation": {"required_scope": WIDER, "timeout_seconds": 600}}


class Governed(RuleBasedStateMachine):
    """One run of one tenant. What should be true of it is in plain attributes, and held against the books each time."""

    def __init__(
        self,
        plane: SyncControlPlane,
        tenant: uuid.UUID,
        neighbour: uuid.UUID,
        lapse: Callable[[str, str, uuid.UUID], None],
        *,
        hands_on: bool,
    ) -> None:
        super().__init__()
        self.plane, self.tenant, self.neighbour, self.lapse = plane, tenant, neighbour, lapse
        self.hands_on = hands_on
        request = RunRequest(
            tenant_id=tenant,
            run_id=new_id(),
            agent={"name": "a"},
            input={},
            trace_id=uuid.uuid4().hex,
            run_group_id=new_id(),
        )
        self.ids = {HaltScope.RUN: request.run_id, HaltScope.RUN_GROUP: request.run_group_id}
        self.run, _ = plane.create_run(request, principal=REQUESTER)
        self.state = RunState.QUEUED
        self.lease: Any = None
        self.step, self.attempt = 0, 1
        self.wanted: str | None = None  # the capability that the last attempt still wants to use
        self.refused_by_halt = False
        self.ticket: uuid.UUID | None = None  # goes along with the next proposal
        self.newest: uuid.UUID | None = None
        self.ticket_state = ""
        self.late = False  # its deadline has passed
        self.handed_on = False
        self.votes: dict[int, TicketDecision] = {}
        self.counted: set[int] = set()  # of the votes, those with the authority that is asked for by now
        self.asking = False  # what the newest ticket asks for: an input, or else an approval
        self.given: tuple[int, int] | None = None  # by whom, and what
        self.halts: dict[HaltScope, uuid.UUID] = {}

    def halted(self, capability: str | None) -> bool:
        return bool(self.halts.keys() - {HaltScope.CAPABILITY}) or (
            HaltScope.CAPABILITY in self.halts and capability == WRITE
        )

    @property
    def over(self) -> str:
        """How who comes too late to the newest ticket is refused."""
        return "approval_expired" if self.ticket_state == "expired" else "already_decided"

    @rule()
    def take(self) -> None:
        lease = self.plane.call(lambda core: core.storage.runs.take(self.tenant, self.run.id, owner="w", seconds=600))
        if self.state is RunState.QUEUED and not self.halted(self.wanted):
            self.state, self.lease = RunState.RUNNING, lease
            assert lease is not None
        else:
            assert lease is None
            self.state = RunState.HALTED if self.state is RunState.QUEUED else self.state

    @precondition(lambda self: self.state is RunState.RUNNING)
    @rule(capability=st.sampled_from([READ, WRITE, WRITE]), begin=st.booleans())
    def propose(self, capability: str, begin: bool) -> None:
        capability = WRITE if self.ticket else capability
        answer = self.plane.admit(
            Proposal(
                tenant_id=self.tenant,
                run_id=self.run.id,
                fencing_token=self.lease.fencing_token,
                step_index=self.step,
                attempt=self.attempt,
                step_id=f"s{self.step}",
                capability=capability,
                resource="thing/1",
                arguments={"name": "one"},
                principal=REQUESTER,
                ticket_id=self.ticket,
            ),
            begin=begin,
        )
        self.wanted, self.refused_by_halt = capability, False
        if self.halted(capability):
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.HALTED
            self.attempt, self.refused_by_halt = self.attempt + 1, True
        elif capability == WRITE and self.ticket is None:
            assert isinstance(answer, Pending)
            self.ticket = self.newest = answer.ticket_id
            self._opened(asking=False)
        elif self.ticket is not None and self.ticket_state == "denied":
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.APPROVAL_DENIED
            self.attempt, self.ticket, self.wanted = self.attempt + 1, None, None
        elif self.ticket is not None and self.late:
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.APPROVAL_EXPIRED, "also where it was approved in time"
            self.attempt, self.ticket, self.wanted = self.attempt + 1, None, None
        else:
            assert isinstance(answer, Granted)
            self._call(answer)

    @precondition(lambda self: self.state is RunState.RUNNING and self.ticket is None)
    @rule()
    def ask(self) -> None:
        answer = self.plane.ask(
            InputRequest(
                tenant_id=self.tenant,
                run_id=self.run.id,
                fencing_token=self.lease.fencing_token,
                step_index=self.step,
                attempt=self.attempt,
                step_id=f"s{self.step}",
                question="How many?",
                schema={"type": "integer"},
                principal=REQUESTER,
            )
        )
        if self.halted(None):
            assert isinstance(answer, Denied), "and nothing is booked"
            assert answer.reason is Reason.HALTED
            return
        assert isinstance(answer, Pending)
        self.newest, self.given, self.wanted, self.refused_by_halt = answer.ticket_id, None, None, False
        self._opened(asking=True)

    def _opened(self, *, asking: bool) -> None:
        self.ticket_state, self.votes, self.counted, self.state = "pending", {}, set(), RunState.AWAITING_APPROVAL
        self.asking, self.late, self.handed_on = asking, False, False

    @precondition(lambda self: self.ticket_state == "pending" or (self.ticket_state == "approved" and self.ticket))
    @precondition(lambda self: self.newest is not None and not self.late)
    @rule()
    def pass_the_deadline(self) -> None:
        """One that is pending is handed on or expires when somebody looks after the run; a decided one stays."""
        newest = self.newest
        assert newest is not None
        self.lapse("approval_tickets", "deadline", newest)
        pending, handing_on = self.ticket_state == "pending", self.hands_on and not self.handed_on
        self.late = not (pending and handing_on)
        if not pending:
            return
        revived = self.plane.call(lambda core: core.storage.runs.revive(self.tenant, self.run.id, patience_seconds=600))
        assert revived is not handing_on, "who is handed a ticket has the time of the wider circle"
        if handing_on:
            self.handed_on, self.counted = True, set()
        else:
            self.ticket_state, self.state = "expired", RunState.QUEUED
            self.attempt += self.asking

    @precondition(lambda self: self.newest is not None)
    @rule(person=st.integers(0, len(PEOPLE) - 1), value=st.integers(0, 1))
    def give(self, person: int, value: int) -> None:
        try:
            self.plane.provide_input(self.tenant, self.newest, value, approver=PEOPLE[person])  # type: ignore[arg-type]
            refusal = ""
        except (Forbidden, Conflict) as error:
            refusal = error.reason
        if not self.asking:
            assert refusal == "ticket_kind"
        elif self.handed_on and person == OUTSIDE:
            assert refusal == "missing_scopes"
        elif self.ticket_state == "pending":
            assert refusal == "", "the requester may give it too"
            self.given, self.ticket_state = (person, value), "approved"
            self.step, self.attempt, self.state = self.step + 1, 1, RunState.QUEUED
        elif self.given == (person, value):
            assert refusal == "", "the same word again"
        else:
            assert refusal == self.over

    def _call(self, granted: Granted) -> None:
        token = self.lease.fencing_token
        assert granted.begun or self.plane.begin(granted.grant, fencing_token=token, actor="test").accepted
        self.plane.settle(
            granted.grant,
            Outcome(status=OutcomeStatus.SUCCEEDED),
            capability=self.plane.call(described),
            fencing_token=token,
            trace_id=self.run.trace_id,
            actor="test",
        )
        self.step, self.attempt, self.ticket, self.wanted = self.step + 1, 1, None, None

    @precondition(lambda self: self.state is RunState.RUNNING and self.refused_by_halt)
    @rule()
    def park(self) -> None:
        left = self.plane.finish(
            self.run, fencing_token=self.lease.fencing_token, state=RunState.HALTED, actor="worker:w"
        )
        self.state = RunState.HALTED if self.halted(self.wanted) else RunState.QUEUED
        assert left is self.state

    @precondition(lambda self: self.newest is not None)
    @rule(person=st.integers(0, len(PEOPLE) - 1), decision=st.sampled_from(TicketDecision))
    def vote(self, person: int, decision: TicketDecision) -> None:
        try:
            self.plane.decide(self.tenant, self.newest, decision, approver=PEOPLE[person])  # type: ignore[arg-type]
            refusal = ""
        except (Forbidden, Conflict) as error:
            refusal = error.reason
        if self.asking:
            self._refuse_to_give(person, decision, refusal)
        elif self.handed_on and person == OUTSIDE:
            assert refusal == "missing_scopes"
        elif person == 0:
            assert refusal == "separation_of_duties"
        elif self.votes.get(person) is decision and (person in self.counted or self.ticket_state != "pending"):
            assert refusal == "", "the same word again"
        elif self.ticket_state != "pending":
            assert refusal == self.over
        elif self.votes.get(person, decision) is not decision:
            assert refusal == "already_voted"
        else:
            assert refusal == "", "the same word with more authority counts anew"
            self.votes[person] = decision
            self.counted.add(person)
            approvals = sum(self.votes[each] is TicketDecision.APPROVE for each in self.counted)
            if decision is TicketDecision.DENY or approvals == QUORUM:
                self.ticket_state = "denied" if decision is TicketDecision.DENY else "approved"
                self.state = RunState.QUEUED if self.state is RunState.AWAITING_APPROVAL else self.state

    @precondition(lambda self: self.ticket_state == "pending" and not self.asking)
    @rule()
    def approve(self) -> None:
        """By as many as it takes, where nobody denied it: else few tries come that far."""
        for person in range(1, QUORUM + 1):
            self.vote(person, TicketDecision.APPROVE)

    @precondition(lambda self: self.hands_on and self.ticket_state == "pending" and not self.handed_on)
    @rule()
    def hand_on(self) -> None:
        """After a word that counts no longer then, and with all who may not and may give one: few tries do all that."""
        words = (lambda person: self.give(person, 0)) if self.asking else self._approve_as
        if not self.asking:
            self._approve_as(1)
        self.pass_the_deadline()
        for person in (OUTSIDE, 2, 1):
            words(person)
            self.the_books_say_the_same()

    def _approve_as(self, person: int) -> None:
        self.vote(person, TicketDecision.APPROVE)

    def _refuse_to_give(self, person: int, decision: TicketDecision, refusal: str) -> None:
        if decision is TicketDecision.APPROVE:
            assert refusal == "ticket_kind"
        elif self.handed_on and person == OUTSIDE:
            assert refusal == "missing_scopes"
        elif self.votes.get(person) is decision:
            assert refusal == "", "the same word again"
        elif self.ticket_state != "pending":
            assert refusal == self.over
        else:
            assert refusal == ""
            self.votes[person], self.ticket_state = decision, "denied"
            self.attempt, self.state = self.attempt + 1, RunState.QUEUED

    @rule()
    def take_in_another_tenant(self) -> None:
        """A run of somebody else is held up by a system halt and by no other."""
        request = RunRequest(
            tenant_id=self.neighbour, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        run, _ = self.plane.create_run(request, principal=REQUESTER)
        lease = self.plane.call(lambda core: core.storage.runs.take(self.neighbour, run.id, owner="w", seconds=600))
        assert (lease is None) is (HaltScope.SYSTEM in self.halts)
        self.plane.cancel(self.neighbour, run.id, by=REQUESTER)

    def teardown(self) -> None:
        """Nothing of this try is over the next one."""
        if HaltScope.SYSTEM in self.halts:
            self.plane.lift(self.tenant, self.halts[HaltScope.SYSTEM], by=PEOPLE[1])

    @rule(scope=st.sampled_from(HaltScope))
    def halt(self, scope: HaltScope) -> None:
        named = {HaltScope.AGENT: "a", HaltScope.CAPABILITY: WRITE}
        halt = self.plane.halt(
            self.tenant, scope, self.ids.get(scope), subject=named.get(scope), reason="x", by=PEOPLE[1]
        )
        assert self.halts.setdefault(scope, halt.id) == halt.id, "a standing halt is answered as it is"

    @precondition(lambda self: self.halts)
    @rule(data=st.data())
    def lift(self, data: Any) -> None:
        scope = data.draw(st.sampled_from(sorted(self.halts)))
        self.plane.lift(self.tenant, self.halts.pop(scope), by=PEOPLE[1])
        if self.state is RunState.HALTED and not self.halted(self.wanted):
            self.state = RunState.QUEUED

    @precondition(lambda self: self.state in (RunState.QUEUED, RunState.HALTED, RunState.AWAITING_APPROVAL))
    @precondition(lambda self: self.step > 1)
    @rule()
    def cancel(self) -> None:
        self.plane.cancel(self.tenant, self.run.id, by=REQUESTER)
        self.state = RunState.CANCELLED
        self.ticket_state = "cancelled" if self.ticket_state == "pending" else self.ticket_state

    @invariant()
    def the_books_say_the_same(self) -> None:
        assert self.plane.call(lambda core: core.storage.runs.get(self.tenant, self.run.id)).state is self.state
        standing = self.plane.call(
            lambda core: core.storage.halts.list(self.tenant, limit=9, before=None, standing=True)
        )
        assert {each.scope: each.id for each in standing} == self.halts
        if self.newest is not None:
            newest = self.newest
            ticket = self.plane.call(lambda core: core.storage.approvals.get(self.tenant, newest))
            votes = self.plane.call(lambda core: core.storage.approvals.votes(self.tenant, newest))
            assert ticket.state.value == self.ticket_state
            assert (ticket.escalated_at is not None) is self.handed_on
            assert ticket.kind is (TicketKind.INPUT if self.asking else TicketKind.APPROVAL)
            assert ticket.input == (self.given[1] if self.asking and self.given is not None else None)
            assert {each.voter: each.vote for each in votes} == {
                PEOPLE[person].user_id: vote for person, vote in self.votes.items()
            }


async def described(core: ControlPlane) -> Any:
    return core.capability(READ)


@pytest.mark.parametrize("hands_on", [False, True], ids=["denied in time", "handed on"])
def test_any_sequence_leaves_what_the_oracle_says(against_oracle: Any, hands_on: bool) -> None:
    against_oracle(
        partial(Governed, hands_on=hands_on),
        steps=40,
        lapsing=True,
        neighbourly=True,
        variants=2,
        approval={"quorum": QUORUM, "input": {"max_per_run": 1000}, **(HANDED_ON if hands_on else {})},
    )
