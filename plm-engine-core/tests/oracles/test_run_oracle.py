"""One run beside a small oracle: it ends once, waits where nobody knows, and no end leaves a call open."""

from __future__ import annotations

import uuid
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
from plm_engine_core.control_plane.errors import Conflict, FencingLost
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, Reason, RunState

WHO = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.runs.create", "things.read"}))
LONG, LAPSED = 600.0, 1e-6  # the second is over before anybody can ask again
ENDS = (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)
OUTCOMES = (OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED, OutcomeStatus.SUPERSEDED, OutcomeStatus.OUTCOME_UNKNOWN)


class Living(RuleBasedStateMachine):
    """From its creation to its end, with whoever holds it, at most one call under way, and somebody who cancels."""

    def __init__(self, plane: SyncControlPlane, tenant: uuid.UUID) -> None:
        super().__init__()
        self.plane, self.tenant = plane, tenant
        request = RunRequest(
            tenant_id=tenant, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        self.run, _ = plane.create_run(request, principal=WHO)
        self.steps = count()
        self.state, self.token, self.live = RunState.QUEUED, 0, False
        self.cancelling = False
        self.call: Grant | None = None

    @rule(seconds=st.sampled_from([LONG, LONG, LAPSED]))
    def take(self, seconds: float) -> None:
        lease = self.plane.call(
            lambda core: core.storage.runs.take(self.tenant, self.run.id, owner="w", seconds=seconds)
        )
        if self.state is RunState.QUEUED or (self.state is RunState.RUNNING and not self.live):
            assert lease is not None
            self.state, self.token, self.live = RunState.RUNNING, lease.fencing_token, seconds == LONG
        else:
            assert lease is None

    @precondition(lambda self: self.token and self.call is None)
    @rule()
    def start(self) -> None:
        step = next(self.steps)
        proposal = Proposal(
            tenant_id=self.tenant,
            run_id=self.run.id,
            fencing_token=self.token,
            step_index=step,
            attempt=1,
            step_id=f"s{step}",
            capability="thing.read",
            resource="thing",
            arguments={},
            principal=WHO,
        )
        if self.state is not RunState.RUNNING or not self.live:
            with pytest.raises(FencingLost):
                self.plane.admit(proposal, begin=True)
            return
        answer = self.plane.admit(proposal, begin=True)
        if self.cancelling:
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.CANCEL_REQUESTED
        else:
            assert isinstance(answer, Granted)
            self.call = answer.grant

    @precondition(lambda self: self.call is not None)
    @rule(status=st.sampled_from(OUTCOMES))
    def settle(self, status: OutcomeStatus) -> None:
        """Of a lease that ran out it is recorded too, while nobody took the run."""
        assert self.call is not None
        if self.state is not RunState.RUNNING:
            with pytest.raises(FencingLost):
                self._settle(self.call, status)
            return
        self._settle(self.call, status)
        self.call = None
        if status is OutcomeStatus.OUTCOME_UNKNOWN:
            self.state = RunState.OUTCOME_UNKNOWN

    def _settle(self, grant: Grant, status: OutcomeStatus) -> None:
        self.plane.settle(
            grant,
            Outcome(status=status),
            capability=self.plane.call(capability),
            fencing_token=self.token,
            trace_id=self.run.trace_id,
            actor="test",
        )

    @precondition(lambda self: self.token)
    @rule(state=st.sampled_from([RunState.QUEUED, RunState.HALTED, *ENDS]))
    def give_back(self, state: RunState) -> None:
        def finish() -> RunState:
            return self.plane.finish(self.run, fencing_token=self.token, state=state, actor="worker:w")

        if self.state is not RunState.RUNNING:
            with pytest.raises(FencingLost):
                finish()
        elif state in ENDS and self.call is not None:
            with pytest.raises(Conflict, match="settle it first"):
                finish()
        else:
            self.state = RunState.QUEUED if state is RunState.HALTED else state  # no halt stands
            assert finish() is self.state
            self.live = False

    @rule()
    def cancel(self) -> None:
        def ask() -> RunState:
            return self.plane.cancel(self.tenant, self.run.id, by=WHO).state

        if self.state in (RunState.SUCCEEDED, RunState.FAILED, RunState.OUTCOME_UNKNOWN):
            with pytest.raises(Conflict):
                ask()
        elif self.state is RunState.QUEUED and self.call is not None:
            with pytest.raises(Conflict, match="settle it first"):
                ask()
        elif self.state is RunState.RUNNING:
            assert ask() is RunState.RUNNING
            self.cancelling = True
        else:
            assert ask() is RunState.CANCELLED
            self.cancelling = self.cancelling or self.state is not RunState.CANCELLED
            self.state = RunState.CANCELLED

    @rule(happened=st.booleans())
    def reconcile(self, happened: bool) -> None:
        def say() -> Any:
            return self.plane.call(
                lambda core: core.storage.runs.reconcile(
                    self.tenant, self.run.id, happened=happened, output=None, actor="human:x"
                )
            )

        if self.state is RunState.OUTCOME_UNKNOWN:
            self.state = RunState.QUEUED
            assert say().state is self.state
        else:
            with pytest.raises(Conflict):
                say()

    @invariant()
    def the_books_say_the_same(self) -> None:
        run = self.plane.call(lambda core: core.storage.runs.get(self.tenant, self.run.id))
        assert (run.state, run.cancel_requested) == (self.state, self.cancelling)
        assert run.finished is (self.state in ENDS) is (run.finished_at is not None)

    def teardown(self) -> None:
        if self.state in ENDS:
            budgets = self.plane.call(lambda core: core.storage.runs.budgets(self.tenant, self.run.id))
            assert {each.reserved for each in budgets} == {0}
        assert all(each.consistent for each in self.plane.call(lambda core: core.verify_events(self.tenant)))


async def capability(core: ControlPlane) -> Any:
    return core.capability("thing.read")


def test_any_sequence_ends_a_run_once_and_leaves_nothing_open(against_oracle: Any) -> None:
    against_oracle(Living, steps=30)
