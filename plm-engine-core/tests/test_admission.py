"""Admission on a real database: what is granted, what is refused, and what either leaves behind."""

from __future__ import annotations

import asyncio
import json
import uuid
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core.control_plane import Denied, Granted, Steered
from plm_engine_core.control_plane.errors import FencingLost, IdempotencyConflict, InvalidRequest, NotFound
from plm_engine_core.control_plane.policy import Facts, decide
from plm_engine_core.control_plane.vocabulary import BudgetUnit, HaltScope, Reason, StepState

pytestmark = pytest.mark.every_storage

EUR, CALLS = BudgetUnit.EUR, BudgetUnit.CALLS
HALF = Decimal("0.50")


async def test_a_grant_reserves_its_bound_on_the_run_and_the_tenant(bench):
    lease = await bench.lease()
    await bench.grant(lease)
    for scope in ("run", "tenant"):
        assert await bench.budget(lease.run, scope, EUR) == (0, HALF)
        assert await bench.budget(lease.run, scope, CALLS) == (0, 1)
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert step.state is StepState.GRANTED
    assert await bench.kinds(lease.run) == ["run_created", "run_taken", "step_granted"]


async def test_the_same_command_again_gives_the_same_grant_and_reserves_nothing_more(bench):
    lease = await bench.lease()
    first = await bench.grant(lease)
    assert await bench.grant(lease) == first
    assert await bench.budget(lease.run, "run", CALLS) == (0, 1)
    assert (await bench.kinds(lease.run)).count("step_granted") == 1


async def test_ten_times_the_same_command_at_once_is_one_grant(bench):
    lease = await bench.lease()
    grants = await asyncio.gather(*(bench.grant(lease) for _ in range(10)))
    assert len({grant.id for grant in grants}) == 1
    assert await bench.budget(lease.run, "tenant", CALLS) == (0, 1)


async def test_a_refusal_is_repeated_too_even_when_the_policy_became_kinder(bench):
    lease = await bench.lease()
    strict = bench.with_policy(tiers={"thing.read": "blocked"})
    refusal = await strict.control_plane.admit(strict.proposal(lease))
    assert refusal == await bench.control_plane.admit(bench.proposal(lease))


@pytest.mark.parametrize(
    "change",
    [{"arguments": {"name": "two"}}, {"resource": "thing/2"}, {"capability": "thing.fire"}, {"step_id": "other"}],
    ids=lambda change: next(iter(change)),
)
async def test_the_same_attempt_with_other_content_is_a_conflict(bench, change):
    lease = await bench.lease()
    await bench.grant(lease)
    with pytest.raises(IdempotencyConflict, match="already used for another proposal"):
        await bench.control_plane.admit(bench.proposal(lease, **change))


async def test_a_decision_is_stored_with_the_facts_it_came_from(bench):
    lease = await bench.lease()
    await bench.grant(lease)
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    stored = dict(step.decision)
    again = decide(step, bench.control_plane.policy, Facts.from_json(stored.pop("facts")))
    assert json.loads(json.dumps(again.to_json())) == stored


@pytest.mark.parametrize(
    ("capability", "scopes", "reason", "message"),
    [
        ("thing.unknown", {"things.read"}, Reason.CAPABILITY_UNKNOWN, "not registered"),
        ("thing.read", set(), Reason.MISSING_SCOPES, "things.read"),
    ],
)
async def test_a_refused_proposal_is_recorded_and_reserves_nothing(bench, capability, scopes, reason, message):
    lease = await bench.lease()
    who = type(bench.requester)(user_id=bench.requester.user_id, actor_kind="human", scopes=frozenset(scopes))
    denied = await bench.control_plane.admit(bench.proposal(lease, capability=capability, principal=who))
    assert isinstance(denied, Denied)
    assert denied.reason is reason
    assert message in denied.message
    (step,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    assert (step.state, step.error["reason"]) == (StepState.DENIED, reason.value)
    assert await bench.budget(lease.run, "run", CALLS) == (0, 0)
    assert (await bench.kinds(lease.run))[-1] == "step_denied"


async def test_a_steered_proposal_is_answered_with_guidance(bench):
    bench = bench.with_policy(tiers={"thing.read": "steer"}, guidance={"thing.read": "look elsewhere"})
    lease = await bench.lease()
    steered = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(steered, Steered)
    assert steered.guidance == "look elsewhere"


async def test_a_tenant_beyond_its_rate_is_told_when_to_come_back(bench):
    bench = bench.with_policy(rate_limit={"per_second": 0.001, "burst": 1})
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)
    denied = await bench.control_plane.admit(bench.proposal(lease, step_index=1))
    assert denied.reason is Reason.RATE_LIMIT_EXCEEDED
    assert 900_000 < denied.retry_after_ms <= 1_000_000


async def test_of_the_rates_of_agent_and_tenant_a_token_is_taken_of_both_or_of_none(bench):
    once = {"per_second": 0.001, "burst": 1}
    narrow = bench.with_policy(rate_limit={"per_second": 0.001, "burst": 2}, rate_limit_per_agent=once)
    wide = bench.with_policy(rate_limit={"per_second": 1e6, "burst": 1e6}, rate_limit_per_agent=once)
    first, second, third = [await bench.lease(await bench.run(agent={"name": name})) for name in "abc"]
    answers = [
        await under.control_plane.admit(bench.proposal(lease, step_index=step, step_id=f"s{step}"))
        for under, lease, step in (
            (narrow, first, 0),
            (narrow, first, 1),  # no token of the agent is left, so none of the tenant's may go
            (narrow, second, 0),
            (narrow, third, 0),  # and the other way round
            (wide, third, 1),
            (wide, third, 2),
        )
    ]
    refused = [each.rule if isinstance(each, Denied) else "" for each in answers]
    assert refused == ["", "rate_limit_per_agent", "", "rate_limit", "", "rate_limit_per_agent"]


@pytest.mark.parametrize("scope", ["run", "tenant"])
@pytest.mark.parametrize("unit", [EUR, CALLS])
async def test_a_budget_that_is_too_small_is_named_with_its_figures_and_nothing_stays_reserved(bench, scope, unit):
    limits = {"run": {"EUR": "5", "calls": "50"}, "tenant": {"EUR": "5", "calls": "50"}}
    limits[scope][unit.value] = "0.25"
    bench = bench.with_policy(budgets=limits)
    lease = await bench.lease()
    denied = await bench.control_plane.admit(bench.proposal(lease))
    needed = HALF if unit is EUR else Decimal(1)
    assert denied.reason is Reason.BUDGET_EXCEEDED
    assert f"the {scope} budget is too small: limit 0.25 {unit.value}" in denied.message
    assert (denied.limit["scope"], denied.limit["unit"]) == (scope, unit.value)
    assert denied.unblock == f"a higher {scope} budget in {unit.value}"
    assert (Decimal(denied.limit["limit"]), Decimal(denied.limit["needed"])) == (Decimal("0.25"), needed)
    for each in ("run", "tenant"):
        for counted in BudgetUnit:
            assert await bench.budget(lease.run, each, counted) == (0, 0)


async def test_without_a_budget_row_nothing_is_granted(bench):
    lease = await bench.lease()
    bench.behind.delete_rows("budgets", {"scope_kind": "tenant", "unit": "EUR"})
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert denied.reason is Reason.BUDGET_MISSING
    assert "no tenant budget in EUR" in denied.message
    assert await bench.budget(lease.run, "run", EUR) == (0, 0)


async def test_the_limit_itself_may_be_spent(bench):
    bench = bench.with_policy(budgets={"run": {"EUR": "0.50", "calls": "1"}, "tenant": {"EUR": "0.5", "calls": "1"}})
    assert isinstance(await bench.control_plane.admit(bench.proposal(await bench.lease())), Granted)


async def test_forty_admissions_at_once_never_pass_a_limit_of_ten_calls(bench):
    bench = bench.with_policy(budgets={"run": {"EUR": "100", "calls": "50"}, "tenant": {"EUR": "100", "calls": "10"}})
    leases = [await bench.lease() for _ in range(8)]
    answers = await asyncio.gather(
        *(
            bench.control_plane.admit(bench.proposal(lease, step_index=index, step_id=f"s{index}"))
            for lease in leases
            for index in range(5)
        )
    )
    granted = [answer for answer in answers if isinstance(answer, Granted)]
    assert len(granted) == 10
    assert {answer.reason for answer in answers if isinstance(answer, Denied)} == {Reason.BUDGET_EXCEEDED}
    assert await bench.budget(leases[0].run, "tenant", CALLS) == (0, 10)
    assert await bench.budget(leases[0].run, "tenant", EUR) == (0, 10 * HALF)
    per_run = [(await bench.budget(lease.run, "run", CALLS))[1] for lease in leases]
    assert sum(per_run) == 10


async def test_who_no_longer_holds_the_lease_gets_nothing(bench):
    lease = await bench.lease()
    with pytest.raises(FencingLost):
        await bench.control_plane.admit(bench.proposal(lease, fencing_token=lease.fencing_token - 1))
    bench.let_lease_expire(lease.run)
    with pytest.raises(FencingLost):
        await bench.control_plane.admit(bench.proposal(lease))
    assert await bench.storage.runs.steps(bench.tenant, lease.run.id) == []


async def test_a_run_that_does_not_exist_is_named(bench):
    lease = await bench.lease()
    missing = uuid.uuid4()
    with pytest.raises(NotFound) as caught:
        await bench.control_plane.admit(bench.proposal(lease, run_id=missing))
    assert (caught.value.kind, caught.value.identifier) == ("run", str(missing))


async def test_a_standing_halt_refuses_with_its_reason(bench):
    lease = await bench.lease()
    await bench.halt(HaltScope.TENANT, reason="the line smokes")
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert denied.reason is Reason.HALTED
    assert denied.message == "a tenant halt stands: the line smokes"
    assert await bench.budget(lease.run, "run", CALLS) == (0, 0)


@pytest.mark.parametrize(
    "value", [float("nan"), "a\x00b", "\ud800", {1: "x"}, object()], ids=["nan", "nul", "surrogate", "key", "object"]
)
async def test_arguments_that_cannot_be_recorded_are_refused_by_path(bench, value):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest, match=r"arguments\.name"):
        await bench.control_plane.admit(bench.proposal(lease, arguments={"name": value}))


async def test_an_argument_that_no_digest_marks_is_named_by_its_path_too(bench):
    lease = await bench.lease()
    arguments = {"name": "x", "unmarked": {"deep": [1, float("nan")]}}
    with pytest.raises(InvalidRequest, match=r": arguments\.unmarked\.deep\[1\]: ") as caught:
        await bench.control_plane.admit(bench.proposal(lease, capability="thing.write", arguments=arguments))
    assert caught.value.field == "arguments.unmarked.deep[1]"


@pytest.mark.postgres_only
class TestOnTheCallersConnection:
    """The caller's transaction decides what becomes of it."""

    async def test_nothing_is_committed_and_a_rollback_leaves_nothing(self, bench):
        lease = await bench.lease()
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            admission = await bench.control_plane.admit(bench.proposal(lease), connection=connection)
            assert isinstance(admission, Granted)
            await connection.rollback()
        assert await bench.storage.runs.steps(bench.tenant, lease.run.id) == []
        assert await bench.budget(lease.run, "tenant", CALLS) == (0, 0)

    async def test_its_commit_makes_it_stand(self, bench):
        lease = await bench.lease()
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        assert await bench.budget(lease.run, "tenant", CALLS) == (0, 1)

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_an_old_snapshot_could_miss_a_halt_and_is_refused(self, bench, level):
        lease = await bench.lease()
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            await connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
            with pytest.raises(InvalidRequest, match=f"need READ COMMITTED, this transaction is {level}"):
                await bench.control_plane.admit(bench.proposal(lease), connection=connection)

    async def test_a_transaction_of_another_tenant_is_not_moved(self, bench):
        lease = await bench.lease()
        other = bench.behind.new_tenant()
        async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
            await connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(other)])
            with pytest.raises(InvalidRequest, match="bound to another tenant"):
                await bench.control_plane.admit(bench.proposal(lease), connection=connection)

    async def test_autocommit_without_a_transaction_is_refused(self, bench):
        lease = await bench.lease()
        async with await psycopg.AsyncConnection.connect(bench.database.app, autocommit=True) as connection:
            with pytest.raises(InvalidRequest, match="open one first"):
                await bench.control_plane.admit(bench.proposal(lease), connection=connection)
            async with connection.transaction():
                admission = await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        assert isinstance(admission, Granted)


@pytest.mark.postgres_only
async def test_busy_storage_is_a_denial_and_the_same_command_works_later(bench, monkeypatch):
    """The run's row is locked by somebody else for longer than admission waits."""
    lease = await bench.lease()
    bench.sql("ALTER FUNCTION engine_book_patiently_v1 SET lock_timeout = '50ms'")
    with psycopg.connect(bench.database.admin) as blocker:
        blocker.execute("SELECT 1 FROM run_states WHERE run_id = %s FOR UPDATE", [lease.run.id])
        denied = await bench.control_plane.admit(bench.proposal(lease))
        assert denied.reason is Reason.STORAGE_BUSY
        assert denied.retry_after_ms > 0
        assert await bench.storage.runs.steps(bench.tenant, lease.run.id) == []
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)


@pytest.mark.postgres_only
async def test_without_a_database_admission_denies(bench, second_pool):
    lease = await bench.lease()
    bench.control_plane.storage.admission._gateway._pool = second_pool
    await second_pool.close()
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert denied.reason is Reason.STORAGE_BUSY
