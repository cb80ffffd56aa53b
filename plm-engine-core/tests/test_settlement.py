"""Begin and settlement: a grant is used once, and what its call did is written once, with its cost."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core.control_plane import ArtifactRecord, Granted
from plm_engine_core.control_plane.errors import Conflict, FencingLost, IdempotencyConflict, InvalidRequest
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.postgres import open_pool
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    Evidence,
    HaltScope,
    OutcomeStatus,
    Reason,
    RunState,
    StepState,
)
from plm_engine_core.control_plane.why import UNBLOCKED_BY

pytestmark = pytest.mark.every_storage

EUR, CALLS = BudgetUnit.EUR, BudgetUnit.CALLS
THREE = {"thing": Decimal(3)}


async def ledger(bench, run) -> tuple[int, int]:
    row = await bench.storage.runs.mcrc(bench.tenant, run.id)
    return row["telemetry_event_count"], row["connector_call_count"]


class TestBegin:
    """The last act before a call leaves the host."""

    async def test_of_ten_who_begin_at_once_one_may(self, bench):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        answers = await asyncio.gather(*(bench.begin(grant, lease) for _ in range(10)))
        assert sum(answer.accepted for answer in answers) == 1
        assert {answer.reason for answer in answers if not answer.accepted} == {Reason.GRANT_USED}
        assert (await bench.kinds(lease.run)).count("step_started") == 1

    async def test_an_expired_grant_is_refused(self, bench):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        bench.behind.set_time("grants", "expires_at", 0, {"id": grant.id})
        refused(await bench.begin(grant, lease), Reason.GRANT_EXPIRED, "grant")

    @pytest.mark.parametrize("scope", list(HaltScope))
    async def test_a_grant_dies_with_a_halt(self, bench, scope):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        await bench.halt_over(scope, lease.run)
        refused(await bench.begin(grant, lease), Reason.HALTED, "halt")

    async def test_a_run_that_is_being_cancelled_starts_nothing(self, bench):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
        refused(await bench.begin(grant, lease), Reason.CANCEL_REQUESTED, "cancel")

    async def test_neither_an_older_nor_a_newer_holder_may_use_it(self, bench):
        old = await bench.lease()
        grant = await bench.grant(old)
        bench.let_lease_expire(old.run)
        with pytest.raises(FencingLost):
            await bench.begin(grant, old)
        new = await bench.lease(old.run)
        for holder in (old, new):
            with pytest.raises(FencingLost):
                await bench.begin(grant, holder)

    async def test_a_refusal_changes_nothing(self, bench):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        halt = await bench.halt(HaltScope.RUN, lease.run.id)
        before = (await bench.kinds(lease.run), await bench.storage.runs.steps(bench.tenant, lease.run.id))
        for _ in range(2):
            assert not (await bench.begin(grant, lease)).accepted
            await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert (await bench.kinds(lease.run), await bench.storage.runs.steps(bench.tenant, lease.run.id)) == before


def refused(answer, reason, rule):
    """Refused, with the book that did and what would change it."""
    assert (answer.accepted, answer.reason, answer.rule) == (False, reason, rule)
    assert answer.message
    assert answer.unblock == UNBLOCKED_BY[reason]


async def test_what_was_measured_is_charged_and_the_rest_released(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    settlement = await bench.settle(grant, lease, output={"answer": 42}, usage=THREE)
    assert settlement.spent == {"EUR": "0.03", "calls": "1"}
    for scope in ("run", "tenant"):
        assert await bench.budget(lease.run, scope, EUR) == (Decimal("0.03"), 0)
        assert await bench.budget(lease.run, scope, CALLS) == (1, 0)
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert (step.state, step.output) == (StepState.SUCCEEDED, {"answer": 42})
    row = await bench.storage.runs.mcrc(bench.tenant, lease.run.id)
    assert row["connector_cost_eur"] == Decimal("0.03")
    assert await ledger(bench, lease.run) == (1, 1)


async def test_the_same_outcome_again_answers_the_same_and_writes_nothing(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    first = await bench.settle(grant, lease, usage=THREE)
    assert await bench.settle(grant, lease, usage=THREE) == first
    assert await bench.budget(lease.run, "tenant", CALLS) == (1, 0)
    assert await ledger(bench, lease.run) == (1, 1)
    assert (await bench.kinds(lease.run)).count("step_settled") == 1


async def test_ten_settlements_at_once_are_one(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    answers = await asyncio.gather(*(bench.settle(grant, lease, usage=THREE) for _ in range(10)))
    assert len({str(answer) for answer in answers}) == 1
    assert await bench.budget(lease.run, "tenant", CALLS) == (1, 0)
    assert await ledger(bench, lease.run) == (1, 1)


@pytest.mark.parametrize("status", [OutcomeStatus.SUCCEEDED, OutcomeStatus.OUTCOME_UNKNOWN, OutcomeStatus.NOT_STARTED])
async def test_a_lost_reply_can_be_asked_for_after_the_run_moved_on(bench, status):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    first = await bench.settle(grant, lease, status)
    bench.let_lease_expire(lease.run)
    await bench.storage.runs.take(bench.tenant, lease.run.id, owner="next", seconds=60)
    assert await bench.settle(grant, lease, status) == first


@pytest.mark.parametrize(
    "other",
    [
        {"status": OutcomeStatus.FAILED},
        {"output": 1},
        {"usage": {"thing": Decimal(4)}},
        {"usage": None},
        {"layers": ("rlimits",)},
        {"error": {"category": "fatal", "message": "x"}},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_another_outcome_for_the_same_grant_is_a_conflict(bench, other):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease, usage={})
    with pytest.raises(IdempotencyConflict, match="already settled as succeeded"):
        await bench.settle(grant, lease, **{"usage": {}, **other})
    assert await ledger(bench, lease.run) == (1, 1)


async def test_a_call_that_never_began_can_only_be_not_started(bench):
    lease = await bench.lease()
    grant = await bench.grant(lease)
    with pytest.raises(Conflict, match="never begun"):
        await bench.settle(grant, lease)
    assert await ledger(bench, lease.run) == (0, 0)
    await bench.settle(grant, lease, OutcomeStatus.NOT_STARTED)
    assert await bench.budget(lease.run, "run", EUR) == (0, 0)


async def test_an_overspend_is_charged_in_full_and_the_next_call_is_denied(bench):
    bench = bench.with_policy(budgets={"run": {"EUR": "1", "calls": "9"}, "tenant": {"EUR": "100", "calls": "99"}})
    lease = await bench.lease()
    grant = await bench.begun(lease)
    settlement = await bench.settle(grant, lease, usage={"thing": Decimal(777)})
    assert settlement.spent["EUR"] == "7.77"
    assert await bench.budget(lease.run, "run", EUR) == (Decimal("7.77"), 0)
    denied = await bench.control_plane.admit(bench.proposal(lease, step_index=1, step_id="second"))
    assert denied.reason is Reason.BUDGET_EXCEEDED
    assert Decimal(denied.limit["spent"]) == Decimal("7.77")


@pytest.mark.parametrize(
    ("usage", "spent"),
    [
        ({}, "0.50"),
        (THREE, "0.50"),
        ({"thing": Decimal(50)}, "0.50"),
        ({"thing": Decimal(51)}, "0.51"),
        (None, "0.50"),
    ],
    ids=["nothing", "less", "as reserved", "more", "unknown"],
)
async def test_what_somebody_says_of_their_own_call_costs_no_less_than_was_reserved(bench, usage, spent):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease, usage=usage, evidence=Evidence.REPORTED)
    for scope in ("run", "tenant"):
        assert await bench.budget(lease.run, scope, EUR) == (Decimal(spent), 0)
        assert await bench.budget(lease.run, scope, CALLS) == (1, 0)


@pytest.mark.parametrize("status", [OutcomeStatus.NOT_STARTED, OutcomeStatus.SUPERSEDED])
async def test_what_had_no_effect_of_its_own_costs_nothing(bench, status):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease, status, usage=THREE)
    for scope in ("run", "tenant"):
        for unit in BudgetUnit:
            assert await bench.budget(lease.run, scope, unit) == (0, 0)
    assert await ledger(bench, lease.run) == (0, 0)


async def test_an_unknown_outcome_costs_the_reservation_and_parks_the_run(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease, OutcomeStatus.OUTCOME_UNKNOWN, error={"category": "x", "message": "who knows"})
    assert await bench.budget(lease.run, "run", EUR) == (Decimal("0.50"), 0)
    run = await bench.storage.runs.get(bench.tenant, lease.run.id)
    assert (run.state, run.message) == (RunState.OUTCOME_UNKNOWN, "who knows")
    assert await bench.storage.runs.take(bench.tenant, run.id, owner="next", seconds=60) is None


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"thing": Decimal("NaN")},
        {"thing": Decimal("Infinity")},
        {"thing": Decimal(-1)},
        {"thing": Decimal("1e30")},
        {"thing": Decimal("1e999999")},
    ],
    ids=str,
)
async def test_usage_that_is_no_measurement_costs_the_reservation(bench, usage):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    settlement = await bench.settle(grant, lease, usage=usage)
    assert settlement.spent == {"EUR": "0.5", "calls": "1"}
    row = await bench.storage.runs.mcrc(bench.tenant, lease.run.id)
    assert row["connector_cost_eur"] in (None, 0)


async def test_fractions_of_a_hundred_millionth_are_rounded_up_the_same_everywhere(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    settlement = await bench.settle(grant, lease, usage={"thing": Decimal("0.00000150")})
    assert settlement.spent["EUR"] == "0.00000002"
    assert await bench.budget(lease.run, "run", EUR) == (Decimal("0.00000002"), 0)


@pytest.mark.parametrize("taken_over_as", [OutcomeStatus.SUPERSEDED, OutcomeStatus.OUTCOME_UNKNOWN])
async def test_a_late_worker_writes_nothing_its_ledger_rows_included(bench, taken_over_as):
    late = await bench.lease()
    grant = await bench.begun(late)
    bench.let_lease_expire(late.run)
    new = await bench.lease(late.run, owner="new")
    with pytest.raises(FencingLost):
        await bench.settle(grant, late, usage=THREE)
    assert await ledger(bench, late.run) == (0, 0)
    await bench.settle(grant, new, taken_over_as)
    before = await ledger(bench, late.run), await bench.kinds(late.run)
    with pytest.raises(FencingLost):
        await bench.settle(grant, late, usage=THREE)
    assert (await ledger(bench, late.run), await bench.kinds(late.run)) == before
    (step,) = await bench.storage.runs.steps(bench.tenant, late.run.id)
    assert step.state.value == taken_over_as.value


@pytest.mark.postgres_only
async def test_after_any_number_of_refusals_the_same_connection_settles_again(bench):
    """The driver prepares what it sends often; a refusal must not have it believe in what was never prepared."""
    async with open_pool(bench.database.app, max_size=1) as pool:
        bench.storage.admission._gateway._pool = pool
        lease = await bench.lease()
        late = await bench.begun(lease)
        await bench.settle(late, lease, usage=THREE)
        for _ in range(8):
            with pytest.raises(IdempotencyConflict):
                await bench.settle(late, lease, OutcomeStatus.FAILED, usage=THREE)
        for step in range(1, 4):
            grant = await bench.begun(lease, step_index=step, step_id=f"s{step}")
            await bench.settle(grant, lease, usage=THREE)


async def test_an_expired_lease_that_nobody_took_may_still_record_what_happened(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    bench.let_lease_expire(lease.run)
    await bench.settle(grant, lease)
    assert (await bench.storage.runs.steps(bench.tenant, lease.run.id))[0].state is StepState.SUCCEEDED


async def test_a_halt_does_not_hide_what_happened(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.halt(HaltScope.SYSTEM)
    await bench.settle(grant, lease, usage=THREE)
    assert await bench.budget(lease.run, "run", EUR) == (Decimal("0.03"), 0)


async def test_artifacts_are_recorded_with_the_outcome(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    record = ArtifactRecord(
        id=new_id(),
        name="report.html",
        mime_type="text/html",
        size_bytes=12,
        sha256="00" * 32,
        backend="local",
        storage_uri="local://report.html",
    )
    await bench.settle(grant, lease, artifacts=(record,))
    stored = await bench.storage.runs.artifact(bench.tenant, record.id)
    assert (stored.run_id, stored.size_bytes, stored.storage_uri) == (lease.run.id, 12, "local://report.html")


@pytest.mark.parametrize("value", [float("inf"), "a\x00b", ["\udfff"]], ids=["infinity", "nul", "surrogate"])
async def test_an_outcome_that_cannot_be_stored_is_refused_by_path_and_can_be_settled_otherwise(bench, value):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    with pytest.raises(InvalidRequest, match="output"):
        await bench.settle(grant, lease, output=value)
    await bench.settle(grant, lease, OutcomeStatus.FAILED)


@pytest.mark.postgres_only
async def test_a_ledger_row_of_another_key_in_the_way_leaves_nothing_of_the_settlement(bench):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    with psycopg.connect(bench.database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(bench.tenant)])
        connection.execute(
            "INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload,"
            " idempotency_key) VALUES (gen_random_uuid(), %s, %s, %s, 'capability_call', 'thing.read', '{}', 'other')",
            [bench.tenant, lease.run.trace_id, grant.span_id],
        )
    with pytest.raises(Conflict, match="uq_telemetry_events_logical"):
        await bench.settle(grant, lease)
    assert await bench.budget(lease.run, "run", CALLS) == (0, 1)
    assert "step_settled" not in await bench.kinds(lease.run)


@pytest.mark.postgres_only
class TestOnTheCallersConnection:
    """The caller's transaction decides what becomes of it."""

    async def test_a_rollback_leaves_neither_ledger_nor_spend(self, bench):
        lease = await bench.lease()
        grant = await bench.begun(lease)
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            await bench.settle(grant, lease, usage=THREE, connection=connection)
            await connection.rollback()
        assert await ledger(bench, lease.run) == (0, 0)
        assert await bench.budget(lease.run, "run", EUR) == (0, Decimal("0.50"))

    async def test_admission_and_settlement_of_two_steps_share_one_commit(self, bench):
        lease = await bench.lease()
        grant = await bench.begun(lease)
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            await bench.settle(grant, lease, usage=THREE, connection=connection)
            following = bench.proposal(lease, step_index=1, step_id="second")
            assert isinstance(await bench.control_plane.admit(following, connection=connection), Granted)
        assert await bench.budget(lease.run, "run", CALLS) == (1, 1)

    async def test_autocommit_without_a_transaction_is_refused(self, bench):
        lease = await bench.lease()
        grant = await bench.begun(lease)
        async with await psycopg.AsyncConnection.connect(bench.database.app, autocommit=True) as connection:
            with pytest.raises(InvalidRequest, match="open one first"):
                await bench.settle(grant, lease, connection=connection)
        assert await ledger(bench, lease.run) == (0, 0)
