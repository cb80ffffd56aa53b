"""From the second proposal of a run on the books are not asked before they are written, and hold the decision to it."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from plm_engine_core.control_plane import Denied, Granted, Pending, Principal
from plm_engine_core.control_plane.activation import ACTIVATE_SCOPE
from plm_engine_core.control_plane.admission.expected import Expectations
from plm_engine_core.control_plane.limits import Assumed, Bucket, Dimension, Prepared, RateReading, Subjects
from plm_engine_core.control_plane.storage.ports import CLOCK_TOLERANCE
from plm_engine_core.control_plane.vocabulary import BudgetUnit, HaltScope, Reason

pytestmark = pytest.mark.every_storage

EVALUATED = {
    "evaluators": [{"name": "shape", "kind": "json_schema", "gate": True, "config": {"schema": {"type": "object"}}}]
}


@pytest.fixture
def prepared(bench, monkeypatch):
    """The runs that the books were asked about, one entry each time."""
    asked = []
    prepare = bench.storage.admission.prepare

    async def counted(tenant_id, run_id, **keywords):
        asked.append(run_id)
        return await prepare(tenant_id, run_id, **keywords)

    monkeypatch.setattr(bench.storage.admission, "prepare", counted)
    return asked


async def admitted(bench, lease, step, **changes):
    return await bench.control_plane.admit(bench.proposal(lease, step_index=step, step_id=f"s{step}", **changes))


async def recorded(bench, lease, step):
    """The facts that a step's decision was recorded with."""
    steps = await bench.storage.runs.steps(bench.tenant, lease.run.id, since=step)
    return steps[0].decision["facts"]


async def test_a_run_asks_once_and_each_later_decision_is_recorded_with_what_it_went_by(bench, prepared):
    lease = await bench.lease()
    for step in range(4):
        before = await bench.storage.runs.now()
        assert isinstance(await admitted(bench, lease, step), Granted)
        after = await bench.storage.runs.now()
        facts = await recorded(bench, lease, step)
        assert facts["rate_allowed"] is True
        at = datetime.fromisoformat(facts["at"])
        assert before - CLOCK_TOLERANCE <= at <= after + CLOCK_TOLERANCE
    assert prepared == [lease.run.id]


async def test_a_rate_that_ends_is_seen_by_the_proposal_that_finds_no_token(bench, prepared):
    bench = bench.with_policy(rate_limit={"per_second": 0.0001, "burst": 3})
    lease = await bench.lease()
    for step in range(3):
        assert isinstance(await admitted(bench, lease, step), Granted)
    denied = await admitted(bench, lease, 3)
    assert isinstance(denied, Denied)
    assert (denied.reason, denied.rule) == (Reason.RATE_LIMIT_EXCEEDED, "rate_limit")
    assert (await recorded(bench, lease, 3))["rate_allowed"] is False
    assert await bench.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 3)
    assert len(prepared) == 2


async def test_whoever_is_too_fast_is_refused_by_asking_and_not_by_undoing_a_booking(bench, prepared, monkeypatch):
    bench = bench.with_policy(rate_limit={"per_second": 0.0001, "burst": 1})
    lease = await bench.lease()
    assert isinstance(await admitted(bench, lease, 0), Granted)
    assert isinstance(await admitted(bench, lease, 1), Denied)

    async def booked(*_):
        pytest.fail("booked before the rate was asked")

    monkeypatch.setattr(bench.storage.admission, "admit_as_assumed", booked)
    assert isinstance(await admitted(bench, lease, 2), Denied)


async def test_agents_and_their_tenant_are_each_charged_a_token(bench):
    rates = {
        "rate_limit": {"per_second": 0.0001, "burst": 5},
        "rate_limit_per_agent": {"per_second": 0.0001, "burst": 3},
    }
    bench = bench.with_policy(**rates)
    one, other = [await bench.lease(await bench.run(agent={"name": name, "plan": {}})) for name in ("one", "other")]
    for step in range(3):
        assert isinstance(await admitted(bench, one, step), Granted)
    assert (await admitted(bench, one, 3)).rule == "rate_limit_per_agent"
    for step in range(2):
        assert isinstance(await admitted(bench, other, step), Granted)
    assert (await admitted(bench, other, 2)).rule == "rate_limit"


async def test_halts_and_activations_are_seen_by_a_proposal_that_did_not_ask(bench, prepared, make_policy):
    lease, later = await bench.lease(), await bench.lease()
    for each in (lease, later):
        assert isinstance(await admitted(bench, each, 0), Granted)
    await bench.halt(HaltScope.RUN, lease.run.id)
    assert (await admitted(bench, lease, 1)).reason is Reason.HALTED
    operator = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({ACTIVATE_SCOPE}))
    await bench.control_plane.activate_policy(
        bench.tenant, make_policy(version="newer"), previous=None, reason="a test", by=operator
    )
    assert (await admitted(bench, later, 1)).reason is Reason.POLICY_CHANGED
    assert len(prepared) == 2


async def test_a_proposal_that_waits_for_a_human_is_booked_without_asking_too(bench, prepared):
    lease = await bench.lease()
    assert isinstance(await admitted(bench, lease, 0), Granted)
    assert isinstance(await admitted(bench, lease, 1, capability="thing.write"), Pending)
    assert prepared == [lease.run.id]


async def test_the_same_proposal_after_a_lost_reply_is_answered_the_same(bench, prepared):
    lease = await bench.lease()
    await admitted(bench, lease, 0)
    assert await admitted(bench, lease, 1) == await admitted(bench, lease, 1)
    assert await bench.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 2)
    assert prepared == [lease.run.id]


async def test_the_rate_is_asked_before_any_evaluator_is(bench, prepared):
    bench = bench.with_policy(**EVALUATED)
    lease = await bench.lease()
    for step in range(3):
        assert isinstance(await admitted(bench, lease, step), Granted)
    assert len(prepared) == 3


async def test_a_clock_that_ran_away_is_read_again(bench, prepared, monkeypatch):
    seconds = 0.0
    plane = bench.control_plane
    monkeypatch.setattr(plane, "_expectations", Expectations(clock=lambda: seconds))
    lease = await bench.lease()
    for step, seconds in enumerate([0.0, 3600.0, 3600.0]):  # noqa: B007  # the clock reads it
        assert isinstance(await admitted(bench, lease, step), Granted)
        at = datetime.fromisoformat((await recorded(bench, lease, step))["at"])
        assert abs(at - await bench.storage.runs.now()) < timedelta(minutes=1)
    assert len(prepared) == 2


async def test_a_delegation_ends_by_the_clock_of_the_books(bench, prepared):
    lease = await bench.lease()
    ends = await bench.storage.runs.now() + CLOCK_TOLERANCE + timedelta(hours=1)
    principal = replace(lease.run.principal, expires_at=ends, delegations_left=0)
    assert isinstance(await admitted(bench, lease, 0, principal=principal), Granted)
    ended = replace(principal, expires_at=await bench.storage.runs.now() - timedelta(milliseconds=50))
    denied = await admitted(bench, lease, 1, principal=ended)
    assert denied.reason is Reason.DELEGATION_EXPIRED
    assert prepared == [lease.run.id]


@pytest.mark.postgres_only
async def test_a_callers_transaction_holds_no_bucket(bench, prepared):
    lease = await bench.lease()
    assert isinstance(await admitted(bench, lease, 0), Granted)
    async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
        proposal = bench.proposal(lease, step_index=1, step_id="s1")
        assert isinstance(await bench.control_plane.admit(proposal, connection=connection), Granted)
        assert len(bench.sql("SELECT 1 FROM rate_buckets WHERE tenant_id = %s FOR UPDATE NOWAIT", bench.tenant)) == 1
    assert prepared == [lease.run.id, lease.run.id]


@pytest.mark.postgres_only
async def test_runs_at_once_take_no_more_tokens_than_there_are(bench):
    bench = bench.with_policy(rate_limit={"per_second": 0.0001, "burst": 20})
    leases = [await bench.lease() for _ in range(6)]

    async def work(lease):
        return [await admitted(bench, lease, step) for step in range(6)]

    answers = [answer for answers in await asyncio.gather(*map(work, leases)) for answer in answers]
    assert sum(isinstance(answer, Granted) for answer in answers) == 20
    assert {answer.reason for answer in answers if isinstance(answer, Denied)} == {Reason.RATE_LIMIT_EXCEEDED}


@pytest.mark.parametrize(("burst", "late"), [(1, timedelta(0)), (9, CLOCK_TOLERANCE * 2), (9, CLOCK_TOLERANCE * -2)])
async def test_what_is_not_as_assumed_writes_nothing(bench, monkeypatch, burst, late):
    bench = bench.with_policy(rate_limit={"per_second": 0.0001, "burst": burst})
    store, lease = bench.storage.admission, await bench.lease()
    assert isinstance(await admitted(bench, lease, 0), Granted)
    (bucket,) = [Bucket(dimension=Dimension.TENANT, per_second=0.0001, burst=burst)]
    events, tokens = await bench.kinds(lease.run), bench.behind.rows("rate_buckets")
    answers, admit_as_assumed = [], store.admit_as_assumed

    async def late_by(command, assumed):
        answers.append(await admit_as_assumed(command, Assumed(buckets=[bucket], at=assumed.at - late)))
        assert await bench.kinds(lease.run) == events
        assert await bench.budget(lease.run, "run", BudgetUnit.CALLS) == (0, 1)
        if late:
            assert bench.behind.rows("rate_buckets") == tokens
        return answers[-1]

    monkeypatch.setattr(store, "admit_as_assumed", late_by)
    await admitted(bench, lease, 1)
    assert answers == [{"status": "not_as_assumed"}]


def reading(number: int, *, allowed: bool = True) -> tuple[uuid.UUID, uuid.UUID, Prepared]:
    at = datetime(2024, 1, 1, tzinfo=UTC)
    said = Prepared(rate=RateReading(allowed=allowed), at=at, subjects=Subjects())
    return uuid.UUID(int=1), uuid.UUID(int=number), said


def test_only_the_runs_that_were_prepared_last_are_kept():
    known = Expectations()
    for number in range(5000):
        known.learn(*reading(number))
    kept = [number for number in range(5000) if known.of(*reading(number)[:2]) is not None]
    assert kept == list(range(5000 - 4096, 5000))


def test_a_refused_rate_is_expected_of_nobody():
    known = Expectations()
    known.learn(*reading(1))
    known.learn(*reading(1, allowed=False))
    assert known.of(*reading(1)[:2]) is None
