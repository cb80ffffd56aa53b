"""Runs: how they are made, moved between states, taken, cancelled and reconciled."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from plm_engine_core.control_plane.errors import Conflict, FencingLost, Forbidden, IdempotencyConflict, InvalidRequest
from plm_engine_core.control_plane.hitl import ScopeTerms
from plm_engine_core.control_plane.runs import TRANSITIONS, sources_of
from plm_engine_core.control_plane.vocabulary import (
    TERMINAL_RUN_STATES,
    BudgetUnit,
    Evidence,
    HaltScope,
    OutcomeStatus,
    RunState,
    StepState,
    TicketDecision,
)

pytestmark = pytest.mark.every_storage

ENDS = sorted(TERMINAL_RUN_STATES)


async def finish(bench, lease, state=RunState.SUCCEEDED, **rest):
    return await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=state, actor="worker:w", **rest
    )


async def in_state(bench, state):
    """A run that came into `state` the ordinary way."""
    if state is RunState.QUEUED:
        return await bench.run()
    if state is RunState.AWAITING_APPROVAL:
        return (await bench.ask())[0].run
    lease = await bench.lease()
    if state is RunState.OUTCOME_UNKNOWN:
        await bench.settle(await bench.begun(lease), lease, OutcomeStatus.OUTCOME_UNKNOWN)
    elif state is RunState.HALTED:
        await bench.halt(HaltScope.TENANT)
        await finish(bench, lease, state)
    elif state is not RunState.RUNNING:
        await finish(bench, lease, state)
    return lease.run


class TestCreation:
    """A run, its budgets and its job are one commit."""

    async def test_it_starts_queued_with_its_job_and_an_event(self, bench):
        run = await bench.run(input={"a": 1})
        assert (run.state, run.input, run.principal) == (RunState.QUEUED, {"a": 1}, bench.requester)
        assert bench.deliveries(run) == 1
        assert await bench.kinds(run) == ["run_created"]
        row = await bench.storage.runs.mcrc(bench.tenant, run.id)
        assert row["quality_level"] == "pending"

    async def test_the_same_key_and_request_give_the_same_run(self, bench):
        keyed = {"idempotency_key": "k", "request_digest": "d"}
        first, replayed = await bench.control_plane.create_run(bench.request(**keyed), principal=bench.requester)
        assert not replayed
        again, replayed = await bench.control_plane.create_run(bench.request(**keyed), principal=bench.requester)
        assert replayed
        assert again == first
        assert bench.deliveries(first) == 1

    async def test_the_same_key_with_another_request_is_a_conflict(self, bench):
        await bench.run(idempotency_key="k", request_digest="d")
        with pytest.raises(IdempotencyConflict, match="send a new key"):
            await bench.run(idempotency_key="k", request_digest="e")

    async def test_ten_times_the_same_key_at_once_is_one_run(self, bench):
        runs = await asyncio.gather(*(bench.run(idempotency_key="k", request_digest="d") for _ in range(10)))
        assert len({run.id for run in runs}) == 1
        assert len(bench.behind.rows("runs")) == 1
        assert bench.deliveries(runs[0]) == 1

    async def test_creating_needs_its_scope(self, bench):
        with pytest.raises(Forbidden) as caught:
            await bench.run(principal=replace(bench.requester, scopes=frozenset()))
        assert caught.value.missing_scopes == ("plm.runs.create",)

    async def test_a_limit_is_lowered_by_anybody_and_raised_with_a_scope(self, bench):
        lowered = await bench.run(budget={BudgetUnit.EUR: Decimal(1)})
        assert (await bench.storage.runs.budgets(bench.tenant, lowered.id))[0].limit == 1
        with pytest.raises(Forbidden) as caught:
            await bench.run(budget={BudgetUnit.EUR: Decimal("5.01")})
        assert caught.value.missing_scopes == ("plm.cost.override",)
        boss = replace(bench.requester, scopes=bench.requester.scopes | {"plm.cost.override"})
        raised = await bench.run(budget={BudgetUnit.EUR: Decimal(9)}, principal=boss)
        assert (await bench.storage.runs.budgets(bench.tenant, raised.id))[0].limit == 9

    @pytest.mark.parametrize("amount", ["NaN", "Infinity", "-1"])
    async def test_a_budget_is_a_number_from_zero_up(self, bench, amount):
        with pytest.raises(InvalidRequest) as caught:
            await bench.run(budget={BudgetUnit.EUR: Decimal(amount)})
        assert caught.value.field == "budget.EUR"

    @pytest.mark.parametrize(
        "changes",
        [
            {"input": {"a": "\x00"}},
            {"input": {"a": float("nan")}},
            {"trace_id": "x:y"},
            {"root_span_id": "0"},
            {"idempotency_key": "a\x00", "request_digest": "d"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    async def test_what_cannot_be_stored_is_refused_and_leaves_nothing(self, bench, changes):
        with pytest.raises(InvalidRequest):
            await bench.run(**changes)
        assert bench.behind.rows("runs") == []

    async def test_an_id_that_exists_is_a_conflict(self, bench):
        run = await bench.run()
        with pytest.raises(Conflict) as caught:
            await bench.run(run_id=run.id)
        assert caught.value.reason == "already_exists"

    async def test_runs_are_listed_newest_first_page_by_page(self, bench):
        runs = [(await bench.run()).id for _ in range(5)]
        seen, before = [], None
        while page := await bench.storage.runs.list(bench.tenant, limit=2, before=before, state=RunState.QUEUED):
            seen += [run.id for run in page]
            before = (page[-1].created_at, page[-1].id)
        assert seen == runs[::-1]
        assert await bench.storage.runs.list(bench.tenant, limit=9, before=None, state=RunState.FAILED) == []


class TestTransitions:
    """The published table is what storage does."""

    def test_ends_are_ends_and_every_state_is_listed(self):
        assert set(TRANSITIONS) == set(RunState)
        assert {state for state, targets in TRANSITIONS.items() if not targets} == TERMINAL_RUN_STATES
        for target in RunState:
            assert sources_of(target) == tuple(state for state in RunState if target in TRANSITIONS[state])

    @pytest.mark.parametrize("state", list(RunState))
    async def test_only_a_queued_run_can_be_taken(self, bench, state):
        run = await in_state(bench, state)
        taken = await bench.storage.runs.take(bench.tenant, run.id, owner="w", seconds=60)
        assert (taken is not None) == (state is RunState.QUEUED)
        assert await bench.state(run) is (RunState.RUNNING if taken else state)

    @pytest.mark.parametrize("target", [RunState.QUEUED, RunState.HALTED, *ENDS])
    @pytest.mark.parametrize("state", list(RunState))
    async def test_only_the_holder_of_a_running_run_moves_it(self, bench, state, target):
        run = await in_state(bench, state)
        current = await bench.storage.runs.get(bench.tenant, run.id)
        await bench.halt(HaltScope.TENANT)
        moving = bench.control_plane.finish(run, fencing_token=current.fencing_token, state=target, actor="worker:w")
        if state is RunState.RUNNING:
            assert await moving is await bench.state(run) is target
            assert target in TRANSITIONS[state]
        else:
            with pytest.raises(FencingLost):
                await moving
            assert await bench.state(run) is state

    @pytest.mark.parametrize("state", list(RunState))
    async def test_cancel_does_what_the_table_allows(self, bench, state):
        run = await in_state(bench, state)
        jobs = bench.deliveries(run)
        cancelling = bench.control_plane.cancel(bench.tenant, run.id, by=bench.requester)
        if state is RunState.RUNNING:
            assert (await cancelling).cancel_requested
            assert bench.deliveries(run) == jobs + 1
            events = await bench.kinds(run)
            await bench.control_plane.cancel(bench.tenant, run.id, by=bench.requester)
            assert await bench.kinds(run) == events
        elif state is RunState.CANCELLED or RunState.CANCELLED in TRANSITIONS[state]:
            cancelled = await cancelling
            assert (cancelled.state, cancelled.finished) == (RunState.CANCELLED, True)
        else:
            with pytest.raises(Conflict) as caught:
                await cancelling
            assert caught.value.reason == (
                "outcome_unknown" if state is RunState.OUTCOME_UNKNOWN else "impossible_transition"
            )
            assert await bench.state(run) is state

    async def test_of_a_worker_that_takes_and_a_user_who_cancels_one_is_first(self, bench):
        for _ in range(10):
            run = await bench.run()
            lease, cancelled = await asyncio.gather(
                bench.storage.runs.take(bench.tenant, run.id, owner="w", seconds=60),
                bench.control_plane.cancel(bench.tenant, run.id, by=bench.requester),
            )
            assert (lease is None) == (cancelled.state is RunState.CANCELLED)
            if lease is not None:
                assert cancelled.cancel_requested


class TestReconciliation:
    """Somebody says what became of an unknown effect."""

    async def reconcile(self, bench, run, *, happened, output=None):
        return await bench.storage.runs.reconcile(
            bench.tenant, run.id, happened=happened, output=output, actor="human:x"
        )

    @pytest.mark.parametrize("happened", [True, False])
    async def test_the_run_goes_on_in_the_same_commit(self, bench, happened):
        run = await in_state(bench, RunState.OUTCOME_UNKNOWN)
        jobs = bench.deliveries(run)
        reconciled = await self.reconcile(bench, run, happened=happened, output={"a": 1} if happened else None)
        assert reconciled.state is RunState.QUEUED
        assert bench.deliveries(run) == jobs + 1
        (step,) = await bench.storage.runs.steps(bench.tenant, run.id)
        assert step.state is (StepState.SUCCEEDED if happened else StepState.NOT_STARTED)
        assert step.output == ({"a": 1} if happened else None)
        event = (await bench.storage.events.read(bench.tenant, f"run/{run.id}"))[-1]
        assert (event.kind, event.actor, event.data["happened"]) == ("step_reconciled", "human:x", happened)

    @pytest.mark.parametrize("state", [state for state in RunState if state is not RunState.OUTCOME_UNKNOWN])
    async def test_nothing_else_can_be_reconciled(self, bench, state):
        run = await in_state(bench, state)
        with pytest.raises(Conflict) as caught:
            await self.reconcile(bench, run, happened=True)
        assert caught.value.reason == "impossible_transition"

    async def test_it_happens_once(self, bench):
        run = await in_state(bench, RunState.OUTCOME_UNKNOWN)
        answers = await asyncio.gather(
            *(self.reconcile(bench, run, happened=bool(n % 2)) for n in range(6)), return_exceptions=True
        )
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 1


class TestLeases:
    """One holder at a time, by the database's clock; the fencing token grows."""

    async def test_of_ten_who_take_a_run_one_has_it(self, bench):
        run = await bench.run()
        take = bench.storage.runs.take
        leases = await asyncio.gather(*(take(bench.tenant, run.id, owner=f"w{n}", seconds=60) for n in range(10)))
        assert sum(lease is not None for lease in leases) == 1
        assert (await bench.kinds(run)).count("run_taken") == 1

    async def test_a_run_is_taken_over_only_after_its_lease_ran_out(self, bench):
        first = await bench.lease()
        assert await bench.storage.runs.take(bench.tenant, first.run.id, owner="w", seconds=60) is None
        bench.let_lease_expire(first.run)
        second = await bench.lease(first.run)
        assert second.fencing_token == first.fencing_token + 1

    async def test_renewing_keeps_it_and_tells_of_cancels_and_halts(self, bench):
        lease = await bench.lease(seconds=1)
        renew = bench.storage.runs.renew

        async def beat():
            return await renew(bench.tenant, lease.run.id, fencing_token=lease.fencing_token, seconds=3600)

        assert (await beat()).held
        (row,) = bench.behind.rows("run_states")
        assert row["lease_expires_at"] - row["updated_at"] > timedelta(minutes=1)
        halt = await bench.halt(HaltScope.RUN, lease.run.id)
        await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
        heard = await beat()
        assert (heard.cancel_requested, heard.halt["id"], heard.halt["reason"]) == (True, str(halt.id), "stop")
        bench.let_lease_expire(lease.run)
        await bench.lease(lease.run)
        assert not (await beat()).held

    async def test_the_token_never_repeats_not_even_after_parking(self, bench):
        lease, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE)
        again = await bench.lease(lease.run)
        assert again.fencing_token > lease.fencing_token

    async def test_a_lease_given_back_cannot_be_used(self, bench):
        lease = await bench.lease()
        await finish(bench, lease, RunState.QUEUED)
        with pytest.raises(FencingLost):
            await bench.grant(lease)
        with pytest.raises(FencingLost):
            await finish(bench, lease)

    @pytest.mark.parametrize("token", [-1, 2**63, 2**70])
    async def test_a_token_that_nobody_was_ever_given_holds_nothing(self, bench, token):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        plane, stranger = bench.control_plane, replace(lease, fencing_token=token)
        with suppress(InvalidRequest):
            beat = await bench.storage.runs.renew(bench.tenant, lease.run.id, fencing_token=token, seconds=60)
            assert not beat.held
        for attempt in (
            lambda: bench.grant(stranger, step_index=1, step_id="s1"),
            lambda: plane.begin(grant, fencing_token=token, actor="worker:w"),
            lambda: bench.settle(grant, stranger),
            lambda: finish(bench, stranger),
        ):
            with pytest.raises((FencingLost, InvalidRequest)):  # the database has no number for some of them
                await attempt()


class TestQualityLevel:
    """The published rule, applied when a run ends."""

    async def level(self, bench, run):
        return (await bench.storage.runs.mcrc(bench.tenant, run.id))["quality_level"]

    async def write(self, bench, lease, index, evidence, *, approved):
        """One write, approved by a human or let through by policy."""
        place = {"step_index": index, "step_id": f"s{index}", "capability": "thing.write"}
        if approved:
            _, pending = await bench.ask(lease, **place)
            await bench.decide(pending, TicketDecision.APPROVE)
            lease = await bench.lease(lease.run)
            grant = await bench.begun(lease, ticket_id=pending.ticket_id, **place)
        else:
            grant = await bench.begun(lease, **place)
        await bench.settle(grant, lease, evidence=Evidence(evidence), capability_id="thing.write")
        return lease

    async def test_reading_only_is_bronze(self, bench):
        lease = await bench.lease()
        await bench.settle(await bench.begun(lease), lease)
        await finish(bench, lease)
        assert await self.level(bench, lease.run) == "bronze"

    @pytest.mark.parametrize(
        ("writes", "expected"),
        [
            ([("measured", True)], "bronze"),
            ([("verified", False)], "silver"),
            ([("verified", True)], "gold"),
            ([("verified", True), ("verified", False)], "silver"),
            ([("verified", True), ("measured", True)], "bronze"),
            ([("verified", True), ("verified", True)], "gold"),
        ],
    )
    async def test_writes_count_by_what_is_known_and_who_approved(self, bench, writes, expected):
        free = bench.with_policy(tiers={"thing.write": "unrestricted"}, autonomy_ceiling="L3")
        lease = await bench.lease()
        for index, (evidence, approved) in enumerate(writes):
            lease = await self.write(bench if approved else free, lease, index, evidence, approved=approved)
        await finish(bench, lease)
        assert await self.level(bench, lease.run) == expected

    async def test_a_write_under_an_approval_scope_was_approved_by_a_human_as_well(self, bench):
        standing = {"max_uses": 5, "max_seconds": 60, "max_risk": "high"}
        bench = bench.with_policy(approval={"standing": standing})
        _, pending = await bench.ask()
        await bench.decide(pending, TicketDecision.APPROVE, scope=ScopeTerms(uses=1, seconds=60))
        lease = await self.write(bench, await bench.lease(), 0, "verified", approved=False)
        await finish(bench, lease)
        assert await self.level(bench, lease.run) == "gold"

    async def test_a_run_cancelled_while_parked_has_its_level_too(self, bench):
        run = await bench.run()
        await bench.control_plane.cancel(bench.tenant, run.id, by=bench.requester)
        assert await self.level(bench, run) == "bronze"


async def test_a_result_that_cannot_be_stored_is_refused_by_path(bench):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest, match=r"result\.a"):
        await finish(bench, lease, result={"a": "\x00"})
    assert await bench.state(lease.run) is RunState.RUNNING
    assert uuid.UUID(str(lease.run.id)).version == 7
