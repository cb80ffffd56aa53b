"""Budgets of every scope, window and unit, on a real database."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Outcome
from plm_engine_core.control_plane.events import rebuild
from plm_engine_core.control_plane.limits import BudgetKey, Subjects
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, CostBound
from plm_engine_core.control_plane.vocabulary import BudgetScope, CapabilityMode, OutcomeStatus, Reason
from psycopg.types.json import Jsonb

pytestmark = pytest.mark.every_storage

WRITER = CapabilityDescriptor(
    id="text.write",
    description="Have a model write",
    mode=CapabilityMode.READ,
    plugin="texts",
    required_scopes=frozenset({"things.read"}),
    model_argument="model",
    cost=CostBound(max_eur=Decimal("0.50"), max_usage={"tokens": Decimal(100)}),
)

YESTERDAY = """
UPDATE grants SET reserved = (
    SELECT jsonb_agg(CASE WHEN entry ->> 'period' = 'day' THEN jsonb_set(entry, '{starts_at}',
        to_jsonb((entry ->> 'starts_at')::timestamptz - interval '1 day')) ELSE entry END ORDER BY place)
    FROM jsonb_array_elements(reserved) WITH ORDINALITY AS r (entry, place))
"""


@pytest.fixture
def writing(bench, make_policy):
    """The bench with a capability that uses tokens, under a policy with limits."""

    def under(*limits, **changes):
        policy = make_policy(limits=limits, **changes)
        plane = ControlPlane(policy=policy, registry=CapabilityRegistry([WRITER]), storage=bench.storage)
        return replace(bench, control_plane=plane)

    return under


async def asked(bench, lease, index, **changes):
    arguments = changes.pop("arguments", {"model": "small"})
    proposal = bench.proposal(
        lease, capability="text.write", step_index=index, step_id=f"s{index}", arguments=arguments, **changes
    )
    return await bench.control_plane.admit(proposal)


def limit(scope, amount, unit="tokens", per="total", **more):
    return {"scope": scope, "unit": unit, "per": per, "limit": amount, **more}


async def test_two_runs_of_a_group_share_its_budget_and_a_third_without_it_does_not(writing):
    bench = writing(limit("run_group", 200))
    group = uuid.uuid4()
    runs = [await bench.lease(await bench.run(run_group_id=group)) for _ in range(2)]
    assert isinstance(await asked(bench, runs[0], 0), Granted)
    assert isinstance(await asked(bench, runs[1], 0), Granted)
    denied = await asked(bench, runs[0], 1)
    assert (denied.reason, denied.rule) == (Reason.BUDGET_EXCEEDED, "limits.run_group.total.tokens")
    assert (denied.limit["scope_id"], denied.limit["reserved"], denied.limit["needed"]) == (str(group), "200", "100")
    assert "a higher run_group budget in tokens" in denied.unblock
    assert isinstance(await asked(bench, await bench.lease(), 0), Granted)


@pytest.mark.parametrize(
    ("scope", "others"),
    [
        ("agent", {"agent": {"name": "other", "plan": {}}}),
        ("user", {"principal": True}),
        ("team", {"principal": True}),
        ("model", {}),
    ],
)
async def test_each_subject_has_a_budget_of_its_own(writing, scope, others):
    bench = writing()
    bench = writing(limit(scope, 100), teams={"own": [str(bench.requester.user_id)]})
    stranger = replace(bench.requester, user_id=uuid.uuid4())
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0), Granted)
    denied = await asked(bench, lease, 1)
    assert (denied.reason, denied.limit["scope"]) == (Reason.BUDGET_EXCEEDED, scope)
    if "principal" in others:
        others = {"principal": stranger}
    other = await bench.lease(await bench.run(**others))
    arguments = {"model": "large" if scope == "model" else "small"}
    assert isinstance(await asked(bench, other, 0, arguments=arguments), Granted)


async def test_the_limit_of_one_subject_takes_the_place_of_the_general_one(writing):
    bench = writing(limit("agent", 100), limit("agent", 300, subject="test"))
    lease = await bench.lease()
    answers = [await asked(bench, lease, index) for index in range(4)]
    assert [isinstance(each, Granted) for each in answers] == [True, True, True, False]
    assert answers[-1].limit["subject"] == "test"


async def test_a_refusal_of_a_wide_budget_leaves_nothing_reserved_in_the_narrow_ones(writing):
    bench = writing(limit("user", 500), limit("tenant", 50, per="day"))
    lease = await bench.lease()
    denied = await asked(bench, lease, 0)
    assert denied.rule == "limits.tenant.day.tokens"
    for each in await bench.storage.runs.budgets(bench.tenant, lease.run.id):
        assert (each.spent, each.reserved) == (0, 0), each


@pytest.mark.postgres_only
async def test_a_window_that_is_over_holds_nothing_back_and_says_when_the_next_one_comes(writing):
    bench = writing(limit("tenant", 100, per="day"))
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0), Granted)
    denied = await asked(bench, lease, 1)
    assert denied.limit["ends_at"] in denied.unblock
    bench.sql("UPDATE budgets SET starts_at = starts_at - interval '1 day' WHERE period = 'day'")
    bench.sql(YESTERDAY)
    assert isinstance(await asked(bench, lease, 2), Granted)


@pytest.mark.postgres_only
@pytest.mark.parametrize("operators", [False, True])
async def test_a_call_that_a_full_budget_refuses_waits_for_nobody_who_holds_it(writing, operators):
    bench = writing(limit("agent", 100))
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0), Granted)
    if operators:
        bench.sql("UPDATE budgets SET pinned = true WHERE scope_kind = 'agent'")
    with psycopg.connect(bench.database.admin) as other:
        other.execute("SELECT FROM budgets WHERE scope_kind = 'agent' FOR UPDATE")
        denied = await asked(bench, lease, 1)
    assert denied.reason == Reason.BUDGET_EXCEEDED


@pytest.mark.postgres_only
async def test_no_other_limit_comes_between_that_of_a_policy_and_the_reservation_under_it(writing):
    """As where calls under two policies meet in one budget: who has room is not refused for the other's limit."""
    bench = writing(limit("agent", 200))
    assert isinstance(await asked(bench, await bench.lease(), 0), Granted)
    key = BudgetKey.of(BudgetScope.AGENT, "test", "tokens")
    entry = {"scope_kind": "agent", "scope_id": str(key.scope_id), "unit": "tokens", "amount": "100", "limit": "200"}
    with psycopg.connect(bench.database.admin) as call, psycopg.connect(bench.database.admin) as other:
        call.execute("SELECT engine_open_budget_v2(%s, %s, to_timestamp(0))", [bench.tenant, Jsonb(entry)])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SELECT FROM budgets WHERE scope_kind = 'agent' FOR UPDATE NOWAIT")


@pytest.mark.postgres_only
async def test_a_call_is_charged_to_the_window_in_which_it_was_granted(writing):
    bench = writing(limit("tenant", 100, per="day"))
    lease = await bench.lease()
    granted = await asked(bench, lease, 0)
    await bench.begin(granted.grant, lease)
    bench.sql("UPDATE budgets SET starts_at = starts_at - interval '1 day' WHERE period = 'day'")
    bench.sql(YESTERDAY)
    assert isinstance(await asked(bench, lease, 1), Granted)
    plane = bench.control_plane
    await plane.settle(
        granted.grant,
        outcome(usage={"tokens": Decimal(7)}),
        capability=WRITER,
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )
    rows = bench.sql("SELECT spent::int, reserved::int FROM budgets WHERE period = 'day' ORDER BY starts_at")
    assert rows == [(7, 0), (0, 100)]


def outcome(**changes):
    return Outcome(status=OutcomeStatus.SUCCEEDED, **changes)


@pytest.mark.parametrize(
    ("scope", "per"), [("run_group", "total"), ("agent", "day"), ("user", "total"), ("tenant", "day")]
)
async def test_a_limit_of_the_policy_in_force_binds_what_an_earlier_one_opened(writing, scope, per):
    """Lowered it denies at once, whatever was reserved under the higher one; raised it lets go on."""
    granted: list[int] = []
    bench = writing(limit(scope, 1000, per=per))
    lease = await bench.lease(await bench.run(run_group_id=uuid.uuid4()))
    for amount, step in ((300, 0), (300, 1), (100, 2), (200, 3), (300, 4), (300, 5)):
        bench = writing(limit(scope, amount, per=per))
        answer = await asked(bench, lease, step)
        if isinstance(answer, Granted):
            granted.append(step)
        else:
            assert (answer.reason, answer.limit["limit"]) == (Reason.BUDGET_EXCEEDED, str(amount))
    assert granted == [0, 1, 4]
    assert (await rebuild(bench.storage, bench.tenant))[1] == []


async def test_a_run_brings_the_limits_of_its_policy_to_its_tenant_unless_an_operator_set_them(writing):
    def under(calls):
        return writing(budgets={"run": {"EUR": "9", "calls": "9"}, "tenant": {"EUR": "9", "calls": calls}})

    answers = []
    for calls in (3, 1, 2):
        bench = under(calls)
        answers.append(await asked(bench, await bench.lease(), 0))
    assert [isinstance(each, Granted) for each in answers] == [True, False, True]
    assert answers[1].limit["limit"] == "1"
    key, by = BudgetKey(scope=BudgetScope.TENANT, scope_id=bench.tenant, unit="calls"), bench.requester
    by = replace(by, scopes=frozenset({"plm.budgets"}))
    await bench.control_plane.set_budget(bench.tenant, key, Decimal(2), by=by)
    bench = under(9)
    denied = await asked(bench, await bench.lease(), 0)
    assert (denied.reason, denied.limit["limit"]) == (Reason.BUDGET_EXCEEDED, "2")


@pytest.mark.postgres_only
async def test_a_run_takes_the_budgets_of_its_tenant_in_the_order_in_which_calls_do(writing):
    """However the policy lists them; else the two wait for each other."""
    await writing(budgets={"run": {"EUR": "1", "calls": "1"}, "tenant": {"calls": "9", "EUR": "9"}}).run()
    bench = writing(budgets={"run": {"EUR": "1", "calls": "1"}, "tenant": {"calls": "5", "EUR": "5"}})
    lock = "SELECT FROM budgets WHERE tenant_id = %s AND scope_kind = 'tenant' AND unit = %s FOR UPDATE NOWAIT"
    with psycopg.connect(bench.database.admin) as call:
        call.execute(lock, [bench.tenant, "EUR"])
        creating = asyncio.create_task(bench.run())
        while not bench.sql("SELECT pid FROM pg_locks WHERE NOT granted"):
            assert not creating.done()
            await asyncio.sleep(0.01)
        call.execute(lock, [bench.tenant, "calls"])
    await creating


async def test_a_limit_that_an_operator_set_stays_whatever_policy_comes(writing):
    bench = writing(limit("agent", 1000))
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0), Granted)
    key, by = (
        BudgetKey.of(BudgetScope.AGENT, "test", "tokens"),
        replace(bench.requester, scopes=frozenset({"plm.budgets"})),
    )
    await bench.control_plane.set_budget(bench.tenant, key, Decimal(200), by=by)
    answers = [await asked(writing(limit("agent", amount)), lease, step) for step, amount in ((1, 50), (2, 5000))]
    assert [isinstance(each, Granted) for each in answers] == [True, False]
    assert answers[1].limit["limit"] == "200"


async def test_many_calls_under_two_policies_at_once_pass_neither_limit(writing):
    """As while nodes get a new policy one after another."""
    benches = [writing(limit("agent", amount)) for amount in (300, 900)]
    leases = [await benches[0].lease() for _ in range(12)]
    answers = await asyncio.gather(*(asked(benches[at % 2], lease, 0) for at, lease in enumerate(leases)))
    granted = [isinstance(each, Granted) for each in answers]
    assert sum(granted[::2]) <= 3
    assert 6 <= sum(granted) <= 9
    assert (await rebuild(benches[0].storage, benches[0].tenant))[1] == []


@pytest.mark.parametrize(
    ("usage", "charged"),
    [({"tokens": Decimal(30)}, 30), ({}, 100), (None, 100), ({"tokens": Decimal(130)}, 130), ({"tokens": -1}, 100)],
    ids=["measured", "unmeasured", "unknown", "overspent", "nonsense"],
)
async def test_measured_usage_takes_the_place_of_the_bound(writing, usage, charged):
    bench = writing(limit("agent", 1000))
    lease = await bench.lease()
    granted = await asked(bench, lease, 0)
    await bench.begin(granted.grant, lease)
    usage = None if usage is None else {unit: Decimal(amount) for unit, amount in usage.items()}
    settlement = await bench.control_plane.settle(
        granted.grant,
        outcome(usage=usage),
        capability=WRITER,
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )
    assert settlement.spent["tokens"] == str(charged)
    (budget,) = [each for each in await bench.storage.runs.budgets(bench.tenant, lease.run.id) if each.scope == "agent"]
    assert (budget.spent, budget.reserved, budget.subject) == (charged, 0, "test")


async def test_no_overspend_is_lost_however_large_their_sum_is(writing):
    most, calls = Decimal("99999999999.99999999"), 11
    plenty = {"EUR": "100", "calls": "100"}
    bench = writing(limit("tenant", 2000, per="day"), budgets={"run": plenty, "tenant": plenty})
    lease = await bench.lease()
    grants = [(await asked(bench, lease, index)).grant for index in range(calls)]
    for grant in grants:
        await bench.begin(grant, lease)
        settled = await bench.control_plane.settle(
            grant,
            outcome(usage={"tokens": most}),
            capability=WRITER,
            fencing_token=lease.fencing_token,
            trace_id=lease.run.trace_id,
            actor="test",
        )
        assert settled.spent["tokens"] == str(most)
    budgets = await bench.storage.runs.budgets(bench.tenant, lease.run.id)
    (budget,) = [each for each in budgets if each.unit == "tokens"]
    assert (budget.spent, budget.reserved) == (calls * most, 0)
    denied = await asked(bench, lease, calls)
    assert (denied.reason, denied.limit["spent"]) == (Reason.BUDGET_EXCEEDED, str(calls * most))
    assert (await rebuild(bench.storage, bench.tenant))[1] == []


async def test_what_never_started_comes_back_whole(writing):
    bench = writing(limit("agent", 100))
    lease = await bench.lease()
    granted = await asked(bench, lease, 0)
    await bench.control_plane.settle(
        granted.grant,
        replace(outcome(), status=OutcomeStatus.NOT_STARTED),
        capability=WRITER,
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )
    assert isinstance(await asked(bench, lease, 1), Granted)


async def test_a_unit_that_the_call_does_not_bound_is_charged_and_then_denied(writing):
    bench = writing(limit("agent", 10, unit="emails"), units=["emails"])
    lease = await bench.lease()
    granted = await asked(bench, lease, 0)
    await bench.begin(granted.grant, lease)
    await bench.control_plane.settle(
        granted.grant,
        outcome(usage={"emails": Decimal(11)}),
        capability=WRITER,
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )
    denied = await asked(bench, lease, 1)
    assert (denied.reason, denied.limit["unit"], denied.limit["spent"]) == (Reason.BUDGET_EXCEEDED, "emails", "11")


async def test_the_first_uses_of_a_budget_at_once_open_it_once(writing):
    bench = writing(limit("user", 300), limit("team", 10_000), limit("tenant", 10_000, per="month"))
    leases = [await bench.lease() for _ in range(8)]
    answers = await asyncio.gather(*(asked(bench, lease, 0) for lease in leases))
    assert sum(isinstance(each, Granted) for each in answers) == 3
    assert {each.rule for each in answers if isinstance(each, Denied)} == {"limits.user.total.tokens"}
    assert [each["reserved"] for each in bench.behind.rows("budgets") if each["scope_kind"] == "user"] == [300]


@pytest.mark.parametrize(
    ("allowed", "arguments", "granted"),
    [
        (["small", "mid-*"], {"model": "small"}, True),
        (["small", "mid-*"], {"model": " MID-2 "}, True),
        (["small", "mid-*"], {"model": "large"}, False),
        (["small"], {}, False),
        (["small"], {"model": 5}, False),
        ([], {"model": "small"}, False),
    ],
)
async def test_only_the_models_that_the_policy_allows_are_used(writing, allowed, arguments, granted):
    bench = writing(models={"allowed": allowed})
    answer = await asked(bench, await bench.lease(), 0, arguments=arguments)
    assert isinstance(answer, Granted) == granted
    if not granted:
        assert (answer.reason, answer.rule) == (Reason.MODEL_NOT_ALLOWED, "models.allowed")


async def test_a_user_and_an_action_tier_may_have_models_of_their_own(writing):
    tiers = {"trusted": ["house"], "standard": ["small"]}
    plain = writing(models={"allowed": ["*"], "tiers": tiers, "by_tier": {"auto_approve": ["trusted"]}})
    lease = await plain.lease()
    denied = await asked(plain, lease, 0)
    assert (denied.reason, denied.rule) == (Reason.MODEL_NOT_ALLOWED, "models.by_tier.auto_approve")
    assert isinstance(await asked(plain, lease, 1, arguments={"model": "House"}), Granted)
    user = lease.run.principal.user_id
    own = writing(models={"allowed": [], "users": {str(user): {"allowed": ["small"]}}})
    assert isinstance(await asked(own, await own.lease(), 0), Granted)
    denied = await asked(own, await own.lease(), 0, arguments={"model": "house"})
    assert denied.rule == f"models.users.{user}.allowed"


async def test_a_model_is_counted_under_one_name_however_it_is_written(writing):
    bench = writing(limit("model", 100, subject="Large"))
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0, arguments={"model": "LARGE"}), Granted)
    assert isinstance(await asked(bench, lease, 1, arguments={"model": " large "}), Denied)
    assert isinstance(await asked(bench, lease, 2, arguments={"model": "small"}), Granted)


@pytest.mark.postgres_only
async def test_an_agent_beyond_its_rate_takes_nothing_of_its_tenants(writing):
    bench = writing(rate_limit={"per_second": 0.001, "burst": 2}, rate_limit_per_agent={"per_second": 0.01, "burst": 1})
    lease = await bench.lease()
    assert isinstance(await asked(bench, lease, 0), Granted)
    denied = await asked(bench, lease, 1)
    assert (denied.reason, denied.rule) == (Reason.RATE_LIMIT_EXCEEDED, "rate_limit_per_agent")
    assert 90_000 < denied.retry_after_ms <= 100_000
    other = await bench.lease(await bench.run(agent={"name": "other", "plan": {}}))
    assert isinstance(await asked(bench, other, 0), Granted)
    third = await bench.lease(await bench.run(agent={"name": "third", "plan": {}}))
    denied = await asked(bench, third, 0)
    assert denied.rule == "rate_limit"
    assert 900_000 < denied.retry_after_ms <= 1_000_000
    assert bench.sql("SELECT tokens::int FROM rate_buckets WHERE dimension = 'agent/third'") == [(1,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits": [limit("agent", 1, unit="rows")]}, "limits.agent.total.rows counts rows, which units does not"),
        ({"limits": [limit("agent", 1), limit("agent", 2)]}, "limits has limits.agent.total.tokens twice"),
        ({"limits": [limit("run", 1)]}, "the limits of a run stand under budgets.run"),
        ({"limits": [limit("tenant", 1)]}, "the limits of a tenant stand under budgets.tenant"),
        ({"limits": [limit("tenant", 1, per="day", subject="x")]}, "a tenant limit has no subject"),
        ({"limits": [limit("user", 1, subject="ann")]}, "the subject of a user limit is its id, a UUID"),
        ({"units": ["tokens"]}, "units has tokens twice"),
        ({"teams": {"a": [str(uuid.UUID(int=1))], "b": [str(uuid.UUID(int=1))]}}, "teams has"),
    ],
)
def test_a_limit_that_cannot_be_kept_is_refused(make_policy, changes, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**changes)


def test_a_policy_that_says_nothing_of_it_keeps_its_digest(make_policy):
    base = make_policy()
    assert make_policy(limits=[], units=[], teams={}).digest == base.digest
    assert PolicySnapshot.model_validate_json(base.model_dump_json()).digest == base.digest
    assert make_policy(limits=[limit("agent", 1)]).digest != base.digest


async def test_a_run_says_for_whom_it_works(writing):
    bench = writing()
    bench = writing(teams={"own": [str(bench.requester.user_id)]})
    group = uuid.uuid4()
    run = await bench.run(run_group_id=group)
    expected = Subjects(agent_id="test", run_group_id=group, user_id=bench.requester.user_id, team="own")
    assert (await bench.storage.runs.get(bench.tenant, run.id)).subjects == expected
