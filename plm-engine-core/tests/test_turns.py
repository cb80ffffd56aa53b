"""Whose turn it is, where more is due than one pass of a sweeper does."""

from __future__ import annotations

from uuid import UUID

import psycopg
import pytest
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.turns import Turns
from plm_engine_core.control_plane.vocabulary import RunKind, RunState

ONE, OTHER, THIRD = (UUID(int=number) for number in (1, 2, 3))

MANY = """
WITH made AS (INSERT INTO runs (id, tenant_id, actor_kind)
    SELECT gen_random_uuid(), tenant_id, 'human' FROM run_states CROSS JOIN generate_series(1, %s) WHERE run_id = %s
    RETURNING id, tenant_id)
INSERT INTO run_states (tenant_id, run_id, kind, state, lease_owner, lease_expires_at, updated_at, agent, input,
        principal, policy_digest, trace_id, root_span_id)
    SELECT made.tenant_id, made.id, kind, state, lease_owner, lease_expires_at, updated_at, agent, input,
        principal, policy_digest, trace_id, root_span_id
    FROM made JOIN run_states AS model ON model.run_id = %s
"""


def rows(tenant, *numbers):
    return [(tenant, UUID(int=number)) for number in numbers]


def test_each_tenant_has_its_turn_and_its_own_rows_their_order():
    due = [*rows(ONE, 10, 11, 12, 13), *rows(OTHER, 20), *rows(THIRD, 30, 31)]
    chosen = Turns(5).choose(due)
    assert chosen == [*rows(ONE, 10), *rows(OTHER, 20), *rows(THIRD, 30), *rows(ONE, 11), *rows(THIRD, 31)]


def test_what_failed_comes_last_and_the_one_that_failed_longest_ago_before_the_others():
    turns, due = Turns(2), rows(ONE, *range(10, 16))
    seen = []
    for _ in range(6):
        chosen = turns.choose(due)
        seen += [row_id.int for _, row_id in chosen]
        for _, row_id in chosen:
            turns.failed(row_id)
    assert seen == [10, 11, 12, 13, 14, 15, 10, 11, 12, 13, 14, 15]
    assert turns.choose([*due, *rows(OTHER, 20)]) == [*rows(OTHER, 20), *rows(ONE, 10)]
    assert turns.choose(rows(ONE, 15)) == rows(ONE, 15)
    assert turns.choose(due) == rows(ONE, 10, 11), "what was done meanwhile is due anew like any other"


@pytest.fixture
async def crowded(bench):
    """Another tenant, and one with more external runs without a holder than a pass does."""
    run = await bench.run(kind=RunKind.EXTERNAL)
    assert await bench.storage.runs.take(bench.tenant, run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    bench.let_lease_expire(run)
    bench.touched(run.id, 3600)
    bench.sql(MANY, 250, run.id, run.id)
    other = bench.other()
    return bench, other, await other.run(kind=RunKind.EXTERNAL)


async def abandoned(other, run):
    """Where the run of the other tenant stands after a sweep, when its holder has gone just now."""
    assert await other.storage.runs.take(other.tenant, run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    other.let_lease_expire(run)
    await Recovery(other.storage).sweep()
    return await other.state(run)


async def test_a_tenant_with_very_many_runs_does_not_make_another_wait(crowded):
    _, other, run = crowded
    assert await abandoned(other, run) is RunState.QUEUED


async def test_more_damaged_runs_than_a_pass_does_hold_up_no_other_of_the_same_tenant(crowded, caplog):
    bench, _, _ = crowded
    bench.sql("UPDATE run_states SET principal = '[]' WHERE state = 'running'")
    good = await bench.run(kind=RunKind.EXTERNAL)
    assert await bench.storage.runs.take(bench.tenant, good.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    bench.let_lease_expire(good)
    recovery = Recovery(bench.storage)
    for _ in range(2):
        await recovery.sweep()
    assert await bench.state(good) is RunState.QUEUED
    assert "a run could not be closed yet" in caplog.text


async def test_more_damaged_runs_than_a_pass_does_let_another_be_driven(bench):
    """Hosted runs whose every change fails, as with a damaged page of the table."""
    run = await bench.run()
    bench.touched(run.id, 3600)
    bench.sql(MANY, 250, run.id, run.id)
    good = await bench.run()
    bench.touched(good.id, 600)
    with psycopg.connect(bench.database.admin, autocommit=True) as superuser:
        superuser.execute(
            "CREATE FUNCTION damaged() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'damaged'; END $$"
        )
        superuser.execute(
            f"CREATE TRIGGER damaged BEFORE UPDATE ON run_states FOR EACH ROW WHEN (OLD.run_id <> '{good.id}') "
            "EXECUTE FUNCTION damaged()"
        )
    recovery = Recovery(bench.storage)
    assert [await recovery.sweep() for _ in range(2)] == [0, 1]
    assert bench.deliveries(good) == 2  # the first was that of its creation
