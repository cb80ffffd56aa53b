"""A decision counts only while its policy is the active one: what another one decided is refused, and decided anew."""

from __future__ import annotations

import asyncio
import uuid

import psycopg
import pytest
from plm_engine_core.control_plane import Denied, Granted, Principal
from plm_engine_core.control_plane.activation import ACTIVATE_SCOPE
from plm_engine_core.control_plane.vocabulary import BudgetScope, BudgetUnit, Reason

pytestmark = pytest.mark.every_storage

WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND NOT granted"


@pytest.fixture
def activate(bench):
    """Activates a policy for the first time."""
    operator = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({ACTIVATE_SCOPE}))

    async def activate(policy):
        plane = bench.control_plane
        return await plane.activate_policy(bench.tenant, policy, previous=None, reason="a test", by=operator)

    return activate


async def test_what_an_earlier_policy_decided_is_refused_and_nothing_booked(bench, make_policy, activate):
    lease = await bench.lease()
    made = await activate(make_policy(version="newer"))
    denied = await bench.control_plane.admit(bench.proposal(lease))
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.rule) == (Reason.POLICY_CHANGED, "policy")
    assert made.digest[:12] in denied.message
    assert denied.retry_after_ms > 0
    assert await bench.storage.runs.steps(bench.tenant, lease.run.id) == []
    assert await bench.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 0)
    assert "step_denied" not in await bench.kinds(lease.run)


async def test_the_same_proposal_is_granted_once_the_active_policy_decides(bench, make_policy, activate):
    lease = await bench.lease()
    made = await activate(make_policy(version="newer"))
    plane = bench.control_plane
    assert isinstance(await plane.admit(bench.proposal(lease)), Denied)
    assert isinstance(await plane.admit(bench.proposal(lease)), Granted)
    assert plane.policy.digest == made.digest


async def test_a_control_plane_whose_keeper_is_entered_decides_by_what_is_active(bench, make_policy, activate):
    made = await activate(make_policy(version="newer"))
    plane = bench.control_plane
    async with plane.keeper:
        assert plane.policy.digest == made.digest
        assert isinstance(await plane.admit(bench.proposal(await bench.lease())), Granted)
        operator = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({ACTIVATE_SCOPE}))
        again = await plane.activate_policy(
            bench.tenant, make_policy(version="newest"), previous=made.digest, reason="a test", by=operator
        )
        plane.keeper.news.set()
        for _ in range(3000):
            if plane.policy.digest == again.digest:
                break
            await asyncio.sleep(0.01)
        assert plane.policy.digest == again.digest
    assert [task for task in asyncio.all_tasks() if task.get_name() == "policy keeper"] == []


async def test_a_run_that_an_earlier_policy_creates_leaves_its_tenant_the_limit_of_the_active_one(
    bench, make_policy, activate
):
    """As on a node that has not heard of the new policy yet."""
    await bench.run()
    changes = {"version": "newer", "budgets": {"run": {"EUR": "1", "calls": "1"}, "tenant": {"EUR": "5", "calls": "5"}}}
    made, newer = await activate(make_policy(**changes)), bench.with_policy(**changes)
    assert newer.control_plane.policy.digest == made.digest
    for each in (newer, bench):
        run = await each.run()
        budgets = await bench.storage.runs.budgets(bench.tenant, run.id)
        assert {budget.limit for budget in budgets if budget.scope is BudgetScope.TENANT} == {5}


async def test_what_was_answered_before_is_answered_again_whatever_is_active_now(bench, make_policy, activate):
    lease = await bench.lease()
    grant = await bench.grant(lease)
    await activate(make_policy(version="newer"))
    assert await bench.grant(lease) == grant


async def test_a_policy_file_decides_until_one_is_activated(bench, activate):
    lease = await bench.lease()
    await activate(bench.control_plane.policy)
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)


@pytest.mark.postgres_only
async def test_an_activation_waits_for_what_is_being_admitted_so_none_is_committed_after_it(
    bench, make_policy, activate
):
    lease = await bench.lease()
    async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
        admission = await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        assert isinstance(admission, Granted)
        activation = asyncio.create_task(activate(make_policy(version="newer")))
        for _ in range(3000):
            if bench.sql(WAITING) == [(1,)]:
                break
            await asyncio.sleep(0.01)
        assert bench.sql(WAITING) == [(1,)]
        assert not activation.done()
    await activation
    late = await bench.control_plane.admit(bench.proposal(lease, step_index=1, step_id="second"))
    assert isinstance(late, Denied)
    assert late.reason is Reason.POLICY_CHANGED
