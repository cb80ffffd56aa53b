"""The lease of a run beside a small oracle: takers, heartbeats, lapses and late writers in whichever order."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plm_engine_core.control_plane import (
    ControlPlane,
    Grant,
    Granted,
    Outcome,
    Principal,
    Proposal,
    RunRequest,
    SyncControlPlane,
)
from plm_engine_core.control_plane.errors import FencingLost
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, RunState

WHO = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.runs.create", "things.read"}))
LONG, LAPSED = 600.0, 1e-6  # the second is over before anybody can ask again


@dataclass(kw_only=True)
class Holder:
    """Somebody who was given the lease once, and a call that they have not settled yet."""

    token: int
    open: Grant | None = None


class Leasing(RuleBasedStateMachine):
    """One run that several want to drive. Only who holds it may start anything; who was replaced can write nothing."""

    def __init__(self, plane: SyncControlPlane, tenant: uuid.UUID) -> None:
        super().__init__()
        self.plane, self.tenant = plane, tenant
        request = RunRequest(
            tenant_id=tenant, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        self.run, _ = plane.create_run(request, principal=WHO)
        self.steps = count()
        self.holders: list[Holder] = []
        self.held = False  # somebody was given it and has not given it back
        self.live = False  # and it has not run out

    def holds(self, holder: Holder) -> bool:
        return self.held and holder is self.holders[-1]

    @rule(seconds=st.sampled_from([LONG, LAPSED]))
    def take(self, seconds: float) -> None:
        lease = self.plane.call(
            lambda core: core.storage.runs.take(self.tenant, self.run.id, owner="w", seconds=seconds)
        )
        if self.live:
            assert lease is None
            return
        assert lease is not None
        assert all(lease.fencing_token > each.token for each in self.holders), "no token is given twice"
        self.holders.append(Holder(token=lease.fencing_token))
        self.held, self.live = True, seconds == LONG

    @precondition(lambda self: self.holders)
    @rule(who=st.integers(0, 99), seconds=st.sampled_from([LONG, LAPSED]))
    def beat(self, who: int, seconds: float) -> None:
        holder = self.holders[who % len(self.holders)]
        heartbeat = self.plane.call(
            lambda core: core.storage.runs.renew(self.tenant, self.run.id, fencing_token=holder.token, seconds=seconds)
        )
        assert heartbeat.held == self.holds(holder)
        if heartbeat.held:
            self.live = seconds == LONG

    @precondition(lambda self: self.holders)
    @rule(who=st.integers(0, 99), at_once=st.booleans())
    def start_a_call(self, who: int, at_once: bool) -> None:
        holder, step = self.holders[who % len(self.holders)], next(self.steps)
        proposal = Proposal(
            tenant_id=self.tenant,
            run_id=self.run.id,
            fencing_token=holder.token,
            step_index=step,
            attempt=1,
            step_id=f"s{step}",
            capability="thing.read",
            resource="thing",
            arguments={},
            principal=WHO,
        )
        if not (self.holds(holder) and self.live):
            with pytest.raises(FencingLost):
                self.plane.admit(proposal, begin=at_once)
            return
        granted = self.plane.admit(proposal, begin=at_once)
        assert isinstance(granted, Granted)
        assert granted.begun is at_once
        begun = self.plane.begin(granted.grant, fencing_token=holder.token, actor="test")
        assert begun.accepted is not at_once, "a grant is used up once"
        if holder.open is not None:
            self.settle(holder, holder.open)
        holder.open = granted.grant

    @precondition(lambda self: any(each.open for each in self.holders))
    @rule(who=st.integers(0, 99))
    def end_a_call(self, who: int) -> None:
        working = [each for each in self.holders if each.open is not None]
        holder = working[who % len(working)]
        assert holder.open is not None
        if self.holds(holder):  # also after it ran out: what happened is recorded while nobody took over
            self.settle(holder, holder.open)
            holder.open = None
        else:
            with pytest.raises(FencingLost):
                self.settle(holder, holder.open)

    def settle(self, holder: Holder, grant: Grant) -> None:
        self.plane.settle(
            grant,
            Outcome(status=OutcomeStatus.SUCCEEDED),
            capability=self.plane.call(capability),
            fencing_token=holder.token,
            trace_id=self.run.trace_id,
            actor="test",
        )

    @precondition(lambda self: self.holders)
    @rule(who=st.integers(0, 99))
    def give_back(self, who: int) -> None:
        holder = self.holders[who % len(self.holders)]
        if self.holds(holder):
            assert self.finish(holder) is RunState.QUEUED
            self.held = self.live = False
        else:
            with pytest.raises(FencingLost):
                self.finish(holder)

    def finish(self, holder: Holder) -> RunState:
        return self.plane.finish(self.run, fencing_token=holder.token, state=RunState.QUEUED, actor="worker:w")

    @invariant()
    def the_books_say_who_holds_it(self) -> None:
        run = self.plane.call(lambda core: core.storage.runs.get(self.tenant, self.run.id))
        assert run.state is (RunState.RUNNING if self.held else RunState.QUEUED)


async def capability(core: ControlPlane) -> Any:
    return core.capability("thing.read")


def test_any_sequence_leaves_one_holder_and_nothing_of_those_before(against_oracle: Any) -> None:
    against_oracle(Leasing, steps=40)
