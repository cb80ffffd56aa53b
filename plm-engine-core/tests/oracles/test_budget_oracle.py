"""Budgets, grants and halts over them beside a small oracle: in whichever order, the books are what plain sums say."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plm_engine_core.control_plane import (
    ControlPlane,
    Denied,
    Grant,
    Granted,
    Outcome,
    Principal,
    Proposal,
    RunRequest,
    SyncControlPlane,
)
from plm_engine_core.control_plane.errors import Conflict, IdempotencyConflict, InvalidRequest
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import BudgetScope, HaltScope, OutcomeStatus, Reason

SCOPES = frozenset({"plm.runs.create", "things.read", "plm.budgets", "plm.halt"})
WHO = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=SCOPES)
FIRST_LIMIT = 3
STATUSES = [OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED, OutcomeStatus.NOT_STARTED, OutcomeStatus.SUPERSEDED]
FREE = {OutcomeStatus.NOT_STARTED, OutcomeStatus.SUPERSEDED}


class Spending(RuleBasedStateMachine):
    """One tenant's budget in calls, and the grants that draw on it."""

    def __init__(
        self, plane: SyncControlPlane, tenant: uuid.UUID, lapse: Callable[[str, str, uuid.UUID], None]
    ) -> None:
        super().__init__()
        self.plane, self.tenant, self.lapse = plane, tenant, lapse
        request = RunRequest(
            tenant_id=tenant, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        run, _ = plane.create_run(request, principal=WHO)
        lease = plane.call(lambda core: core.storage.runs.take(tenant, run.id, owner="w", seconds=600))
        assert lease is not None
        self.lease = lease
        self.steps = count()
        self.limit, self.spent, self.reserved = Decimal(FIRST_LIMIT), Decimal(0), 0
        self.grants: list[Grant] = []
        self.states: list[str] = []
        self.outcomes: dict[int, OutcomeStatus] = {}
        self.over: set[int] = set()  # whose time ran out before they were used
        self.swept: set[int] = set()
        self.halted: uuid.UUID | None = None

    @property
    def key(self) -> BudgetKey:
        return BudgetKey(scope=BudgetScope.TENANT, scope_id=self.tenant, unit="calls")

    @rule(begin=st.booleans(), again=st.booleans())
    def admit(self, begin: bool, again: bool) -> None:
        step = next(self.steps)
        proposal = Proposal(
            tenant_id=self.tenant,
            run_id=self.lease.run.id,
            fencing_token=self.lease.fencing_token,
            step_index=step,
            attempt=1,
            step_id=f"s{step}",
            capability="thing.read",
            resource="thing",
            arguments={},
            principal=WHO,
        )
        answer = self.plane.admit(proposal, begin=begin)
        if self.halted is not None:
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.HALTED
        elif self.spent + self.reserved + 1 > self.limit:
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.BUDGET_EXCEEDED
        else:
            assert isinstance(answer, Granted)
            self.grants.append(answer.grant)
            self.states.append("begun" if answer.begun else "issued")
            self.reserved += 1
            assert answer.begun is begin
            assert self.plane.admit(proposal, begin=again) == answer, "asked twice, decided once"

    @precondition(lambda self: self.grants)
    @rule(which=st.integers(0, 99))
    def begin(self, which: int) -> None:
        which %= len(self.grants)
        begun = self.plane.begin(self.grants[which], fencing_token=self.lease.fencing_token, actor="test")
        assert begun.accepted == (self.states[which] == "issued")
        if begun.accepted:
            self.states[which] = "begun"
        elif self.states[which] == "expired" or (which in self.swept and self.halted is None):
            assert begun.reason is Reason.GRANT_EXPIRED

    @precondition(lambda self: "issued" in self.states)
    @rule(which=st.integers(0, 99))
    def expire(self, which: int) -> None:
        """It is never made, and what it holds stays held until whoever has the run says so, or a sweep finds it."""
        issued = [number for number, state in enumerate(self.states) if state == "issued"]
        which = issued[which % len(issued)]
        self.lapse("grants", "expires_at", self.grants[which].id)
        self.states[which] = "expired"
        self.over.add(which)

    @precondition(lambda self: self.over)
    @rule(times=st.integers(1, 2))
    def sweep(self, times: int) -> None:
        """What was not used in time comes back, once; nothing else changes."""
        for _ in range(times):
            self.plane.call(swept)
        for which, state in enumerate(self.states):
            if which in self.over and state in ("expired", "revoked"):
                self.states[which], self.outcomes[which] = "settled", OutcomeStatus.NOT_STARTED
                self.swept.add(which)
                self.reserved -= 1

    @precondition(lambda self: self.grants)
    @rule(which=st.integers(0, 99), status=st.sampled_from(STATUSES))
    def settle(self, which: int, status: OutcomeStatus) -> None:
        which %= len(self.grants)
        settle = partial(
            self.plane.settle,
            self.grants[which],
            Outcome(status=status),
            capability=self.plane.call(capability),
            fencing_token=self.lease.fencing_token,
            trace_id=self.lease.run.trace_id,
            actor="test",
        )
        if self.states[which] == "settled" and self.outcomes[which] is not status:
            with pytest.raises(IdempotencyConflict):
                settle()
        elif self.states[which] in ("issued", "expired", "revoked") and status is not OutcomeStatus.NOT_STARTED:
            with pytest.raises(Conflict):
                settle()
        else:
            cost = 0 if status in FREE else 1
            assert settle().spent["calls"] == str(cost)
            if self.states[which] != "settled":
                self.states[which], self.outcomes[which] = "settled", status
                self.reserved -= 1
                self.spent += cost

    @precondition(lambda self: self.halted is None and "issued" in self.states)
    @rule(stays=st.booleans())
    def halt(self, stays: bool) -> None:
        """What has begun goes on to its end; what has not is never made, also when the halt is lifted."""
        self.halted = self.plane.halt(self.tenant, HaltScope.TENANT, None, reason="x", by=WHO).id
        self.states = ["revoked" if state in ("issued", "expired") else state for state in self.states]
        if not stays:
            self.lift()

    @precondition(lambda self: self.halted is not None)
    @rule()
    def lift(self) -> None:
        assert self.halted is not None
        self.plane.lift(self.tenant, self.halted, by=WHO)
        self.halted = None

    @rule(amount=st.sampled_from(["-2", "-1", "-0.5", "0.5", "1"]))
    def correct(self, amount: str) -> None:
        correct = partial(
            self.plane.correct_budget,
            self.tenant,
            self.key,
            Decimal(amount),
            reason="x",
            command_id=uuid.uuid4().hex,
            by=WHO,
        )
        if self.spent + Decimal(amount) < 0:
            with pytest.raises(InvalidRequest):
                correct()
        else:
            correct()
            self.spent += Decimal(amount)

    @rule(limit=st.integers(0, 6))
    def set_limit(self, limit: int) -> None:
        self.plane.set_budget(self.tenant, self.key, Decimal(limit), by=WHO)
        self.limit = Decimal(limit)

    @invariant()
    def the_books_are_the_plain_sums(self) -> None:
        budgets = self.plane.call(
            lambda core: core.storage.budgets.list(self.tenant, limit=9, scope=BudgetScope.TENANT)
        )
        (calls,) = [each for each in budgets if each.unit == "calls"]
        assert (calls.limit, calls.spent, calls.reserved) == (self.limit, self.spent, self.reserved)


async def swept(core: ControlPlane) -> None:
    await Recovery(core.storage).sweep()


async def capability(core: ControlPlane) -> Any:
    return core.capability("thing.read")


def test_any_sequence_leaves_what_plain_sums_say(against_oracle: Any) -> None:
    limits = {"run": {"EUR": "1000", "calls": "1000"}, "tenant": {"EUR": "1000", "calls": FIRST_LIMIT}}
    against_oracle(Spending, steps=25, budgets=limits, lapsing=True)
