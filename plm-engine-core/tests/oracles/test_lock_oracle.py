"""The lock of a resource beside a small oracle: calls begin, end, expire and are lost, in whichever order."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
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
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.runs import Lease
from plm_engine_core.control_plane.vocabulary import HaltScope, LockScope, OutcomeStatus, Reason

WHO = Principal(
    user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.runs.create", "plm.halt", "things.read"})
)
RESOURCES = ("one", "two")
RUNS = 3
ENDS = [OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED, OutcomeStatus.CANCELLED, OutcomeStatus.SUPERSEDED]
SHORT = 1e-6  # a grant that is over before anybody can use it


@dataclass(kw_only=True)
class Call:
    """A call that was granted: `how` it stands; one that expired or was revoked holds nothing, and is closed later."""

    run: int
    resource: str
    grant: Grant
    how: str


class Locking(RuleBasedStateMachine):
    """Three runs of a tenant and two resources. Of each there is one call at a time that may run, and it is told."""

    def __init__(self, plane: SyncControlPlane, tenant: uuid.UUID, scope: LockScope) -> None:
        super().__init__()
        self.plane, self.tenant, self.scope = plane, tenant, scope
        self.core = plane.call(_core)
        self.registry = CapabilityRegistry(
            each.model_copy(update={"lock": scope}) for each in plane.call(_core).registry
        )
        self.leases: list[Lease] = [self.new_run() for _ in range(RUNS)]
        self.steps = [0] * RUNS
        self.calls: list[Call] = []

    def new_run(self) -> Lease:
        request = RunRequest(
            tenant_id=self.tenant, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        run, _ = self.plane.create_run(request, principal=WHO)
        lease = self.plane.call(lambda core: core.storage.runs.take(self.tenant, run.id, owner="w", seconds=600))
        assert lease is not None
        return lease

    def holder(self, run: int, resource: str) -> Call | None:
        """Who holds a resource, as far as this run is concerned."""
        return next(
            (
                call
                for call in self.calls
                if call.resource == resource
                and call.how in ("issued", "begun", "unknown")
                and (self.scope is LockScope.TENANT or call.run == run)
            ),
            None,
        )

    @rule(run=st.integers(0, RUNS - 1), resource=st.sampled_from(RESOURCES), how=st.sampled_from("ibx"))
    def admit(self, run: int, resource: str, how: str) -> None:
        lease, step = self.leases[run], self.steps[run]
        self.steps[run] += 1
        proposal = Proposal(
            tenant_id=self.tenant,
            run_id=lease.run.id,
            fencing_token=lease.fencing_token,
            step_index=step,
            attempt=1,
            step_id=f"s{step}",
            capability="thing.read",
            resource=resource,
            arguments={},
            principal=WHO,
        )
        seconds = SHORT if how == "x" else 600.0
        answer = self.plane.call(lambda _: self.under(seconds).admit(proposal, begin=how == "b"))
        held = self.holder(run, resource)
        if held is not None:
            assert isinstance(answer, Denied)
            assert answer.reason is Reason.RESOURCE_LOCKED
            told = {"run_id": str(held.grant.run_id), "step": held.grant.step_index, "held": held.how}
            assert answer.lock == {"scope": self.scope.value, "resource": resource, **told}
            return
        assert isinstance(answer, Granted)
        stands = {"i": "issued", "b": "begun", "x": "expired"}[how]
        self.calls.append(Call(run=run, resource=resource, grant=answer.grant, how=stands))

    def under(self, seconds: float) -> ControlPlane:
        policy = self.core.policy.model_copy(update={"grant_seconds": seconds})
        return ControlPlane(policy=policy, registry=self.registry, storage=self.core.storage)

    def call(self, which: int, *how: str) -> Call:
        found = [each for each in self.calls if each.how in how]
        return found[which % len(found)]

    @precondition(lambda self: any(each.how in ("issued", "expired", "revoked") for each in self.calls))
    @rule(which=st.integers(0, 99))
    def begin(self, which: int) -> None:
        call = self.call(which, "issued", "expired", "revoked")
        token = self.leases[call.run].fencing_token
        begun = self.plane.begin(call.grant, fencing_token=token, actor="test")
        assert begun.accepted == (call.how == "issued")
        if begun.accepted:
            call.how = "begun"

    @precondition(lambda self: any(each.how == "begun" for each in self.calls))
    @rule(which=st.integers(0, 99), status=st.sampled_from(ENDS))
    def end(self, which: int, status: OutcomeStatus) -> None:
        call = self.call(which, "begun")
        self.settle(call, status)
        self.calls.remove(call)

    @precondition(lambda self: any(each.how in ("issued", "expired", "revoked") for each in self.calls))
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        call = self.call(which, "issued", "expired", "revoked")
        self.settle(call, OutcomeStatus.NOT_STARTED)
        self.calls.remove(call)

    @precondition(lambda self: any(each.how == "begun" for each in self.calls))
    @rule(which=st.integers(0, 99))
    def lose_sight_of(self, which: int) -> None:
        call = self.call(which, "begun")
        if any(each.run == call.run and each is not call for each in self.calls):
            return  # nothing else of a parked run could be settled
        self.settle(call, OutcomeStatus.OUTCOME_UNKNOWN)
        call.how = "unknown"
        self.leases[call.run] = self.new_run()
        self.steps[call.run] = 0
        call.run = -1

    @precondition(lambda self: any(each.how == "unknown" for each in self.calls))
    @rule(which=st.integers(0, 99), happened=st.booleans())
    def reconcile(self, which: int, happened: bool) -> None:
        call = self.call(which, "unknown")
        run = call.grant.run_id
        self.plane.call(
            lambda core: core.storage.runs.reconcile(self.tenant, run, happened=happened, output=None, actor="human:x")
        )
        self.calls.remove(call)

    @rule(run=st.integers(0, RUNS - 1))
    def halt_and_lift(self, run: int) -> None:
        halt = self.plane.halt(self.tenant, HaltScope.RUN, self.leases[run].run.id, reason="x", by=WHO)
        for call in self.calls:
            if call.run == run and call.how in ("issued", "expired"):
                call.how = "revoked"
        self.plane.lift(self.tenant, halt.id, by=WHO)

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        self.plane.call(lambda core: core.storage.locks.sweep(self.tenant, limit=limit))

    def settle(self, call: Call, status: OutcomeStatus) -> None:
        lease = self.leases[call.run]
        self.plane.settle(
            call.grant,
            Outcome(status=status),
            capability=self.plane.call(_capability),
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="test",
        )

    @invariant()
    def the_books_say_who_holds_what(self) -> None:
        held = self.plane.call(lambda core: core.storage.locks.list(self.tenant, limit=99))
        told = sorted((each.grant_id, each.resource, each.held.value) for each in held)
        live = [each for each in self.calls if each.how in ("issued", "begun", "unknown")]
        assert told == sorted((each.grant.id, each.resource, each.how) for each in live)


async def _core(core: ControlPlane) -> ControlPlane:
    return core


async def _capability(core: ControlPlane) -> Any:
    return core.capability("thing.read")


@pytest.mark.parametrize("scope", LockScope)
def test_any_sequence_leaves_one_call_on_each_resource_and_gives_every_lock_back(
    against_oracle: Any, scope: LockScope
) -> None:
    against_oracle(lambda plane, tenant: Locking(plane, tenant, scope), steps=40)
