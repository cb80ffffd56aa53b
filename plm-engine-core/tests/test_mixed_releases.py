"""Nodes of before and after a migration book on one database: what one release begins, any other may end.

The functions of earlier releases stay in the database for nodes that are not upgraded yet. A node of a release is
played by calling its functions, with the command that they all take; which release is said, or drawn, for each call.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter, defaultdict
from dataclasses import fields, replace
from decimal import Decimal
from itertools import product

import pytest
from plm_engine_core import migrations
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, InputRequest
from plm_engine_core.control_plane.admission.ask import Failure
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.events import BEGINNING, rebuild, verify_tenant
from plm_engine_core.control_plane.hitl import ApprovalTicket
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.commands import admit_json, settle_json, vote_json
from plm_engine_core.control_plane.storage.ports import VoteCommand
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.admission import PostgresAdmission, _buckets_json, _ledger_json
from plm_engine_core.control_plane.storage.postgres.gateway import jsonb
from plm_engine_core.control_plane.vocabulary import (
    ActionTier,
    HaltScope,
    OutcomeStatus,
    Reason,
    RiskLevel,
    RunState,
    StepState,
    TicketDecision,
    TicketState,
)

SOAK = float(os.environ.get("SOAK", "0.05"))
TAKEN_BACK = [("0032", 4), ("0033", 5), ("0036", 7)]  # a revision, and the release whose functions came after it
OLDEST = 2  # what version 1 wrote into was changed by the migration that brought version 2
LONG_GONE = 3  # the last release that asked functions of its own what was settled before
LIMIT = 60
RATE = {"per_second": 1e6, "burst": 1e6}


class AnyRelease(PostgresAdmission):
    """The books as nodes of several releases reach them; `release` says of each call which.

    A release calls of each function the newest version that came with it or before.
    """

    def __init__(self, gateway, release, versions):
        super().__init__(gateway)
        self._release = lambda call: max(each for each in versions[call] if each <= release(call))

    async def admit(self, command, *, connection=None):
        return await self._one(command.tenant_id, f"engine_admit_v{self._release('admit')}(%s)", _json(command))

    async def admit_as_assumed(self, command, assumed):
        booked = f"engine_admit_v{self._release('admit')}(%s)"
        values = [*_json(command), command.tenant_id, command.run_id, _buckets_json(tuple(assumed.buckets))]
        return await self._one(command.tenant_id, f"engine_as_assumed_v1({booked}, %s, %s, %s)", values)

    async def begin(self, grant, *, fencing_token, actor):
        version = self._release("begin")
        step = [grant.step_index, grant.attempt] if version > OLDEST else []
        values = [grant.tenant_id, grant.run_id, *step, grant.id, fencing_token, actor]
        call = f"engine_begin_v{version}({', '.join(['%s'] * len(values))})"
        return await self._one(grant.tenant_id, call, values)

    async def settle(self, command, *, connection=None):
        version = self._release("settle")
        values = [jsonb(settle_json(command), root="outcome"), *([_ledger_json(command)] if version > OLDEST else [])]
        call = f"engine_settle_v{version}({', '.join(['%s'] * len(values))})"
        return await self._one(command.tenant_id, call, values)

    async def _one(self, tenant, call, values):
        async with self._gateway.transaction(tenant) as connection:
            cursor = await connection.execute(f"SELECT {call} AS answer".encode(), values)
            return (await cursor.fetchone())["answer"]


def _json(command):
    return [jsonb(admit_json(command), root="proposal")]


@pytest.fixture
def versions(bench):
    """The versions of each function."""
    found = defaultdict(set)
    for (name,) in bench.sql("SELECT proname FROM pg_proc WHERE proname ~ '^engine_(admit|begin|settle)_v[0-9]+$'"):
        _, call, version = name.split("_")
        found[call].add(int(version[1:]))
    return found


@pytest.fixture
def releases(versions):
    """Every release that brought a new version of one of the functions."""
    brought = sorted(each for each in set().union(*versions.values()) if each >= OLDEST)
    assert len(brought) > 1
    return brought


@pytest.fixture
async def nodes(bench, versions):
    """A bench whose bookings are of the releases that `choose` answers, over connections enough for a crowd."""
    async with open_pool(bench.database.app, max_size=8) as pool:

        def choosing(choose, **policy):
            storage = PostgresStorage(pool, bench.storage.runs._delivery)
            storage.admission = AnyRelease(storage.admission._gateway, choose, versions)
            under = bench.with_policy(**policy).control_plane.policy
            registry = bench.control_plane.registry
            return replace(bench, control_plane=ControlPlane(policy=under, registry=registry, storage=storage))

        yield choosing


def standing(bench):
    """What is spent and reserved of the tenant's calls, in columns that every release has."""
    told = "SELECT spent, reserved FROM budgets WHERE tenant_id = %s AND scope_kind = 'tenant' AND unit = 'calls'"
    (calls,) = bench.sql(told, bench.tenant)
    return calls


async def ledger(bench, run):
    """How many events and calls are recorded of a run."""
    row = await bench.storage.runs.mcrc(bench.tenant, run.id)
    return row["telemetry_event_count"], row["connector_call_count"]


async def assert_whole(bench):
    """Every chain holds, the feed has every event, and what is told by events alone is what the tables say."""
    results = await verify_tenant(bench.storage, bench.tenant)
    assert [each for each in results if not each.consistent] == []
    fed, cursor = Counter(), BEGINNING
    async with asyncio.timeout(60):
        while True:
            page = await bench.storage.events.feed(bench.tenant, after=cursor, limit=200)
            fed.update(event.stream for event in page.events)
            cursor = page.cursor
            if not page.events and page.held_back is None:
                break
    assert fed == {each.stream: each.events for each in results}
    assert (await rebuild(bench.storage, bench.tenant))[1] == []


@pytest.mark.parametrize("status", [OutcomeStatus.SUCCEEDED, OutcomeStatus.NOT_STARTED])
async def test_whatever_release_admits_begins_and_settles_the_books_are_the_same(bench, nodes, releases, status):
    now = {}
    mixed = nodes(now.get)
    spent, settled = Decimal(0), None
    for admits, begins, settles in product(releases, repeat=3):
        now.update(admit=admits, begin=begins, settle=settles)
        lease = await mixed.lease()
        grant = await mixed.grant(lease)
        assert standing(bench) == (spent, 1)
        if status is OutcomeStatus.SUCCEEDED:
            assert (await mixed.begin(grant, lease)).accepted
            assert not (await mixed.begin(grant, lease)).accepted, "a grant is used up for every release"
        first = await mixed.settle(grant, lease, status)
        spent += Decimal(first.spent["calls"])
        settled = settled or first
        assert first == settled, (admits, begins, settles)
        for again in releases:
            now.update(settle=again)
            assert await mixed.settle(grant, lease, status) == settled, "settled before, by whichever release"
        assert standing(bench) == (spent, 0)
        if settles > OLDEST:  # whose nodes sent the ledger's rows by statements of their own
            recorded = int(status is OutcomeStatus.SUCCEEDED)
            assert await ledger(bench, lease.run) == (recorded, recorded)
    await assert_whole(bench)


async def test_whatever_release_begins_and_settles_a_call_its_lock_ends_with_it(bench, nodes, releases):
    now = {"admit": releases[-1]}
    mixed = nodes(now.get).locking()
    for begins, settles in product(releases, repeat=2):
        now.update(begin=begins, settle=settles)
        lease = await mixed.lease()
        grant = await mixed.grant(lease)
        assert (await mixed.begin(grant, lease)).accepted
        late = await mixed.lease()
        denied = await mixed.control_plane.admit(mixed.proposal(late))
        assert denied.reason is Reason.RESOURCE_LOCKED, (begins, settles)
        await mixed.settle(grant, lease)
        assert await mixed.storage.locks.list(mixed.tenant, limit=9) == []
    await assert_whole(bench)


async def test_what_one_release_has_answered_every_other_answers_again(bench, nodes, releases):
    now = {}
    mixed = nodes(now.get)
    for first, second in product(releases, repeat=2):
        lease = await mixed.lease()
        now.update(admit=first)
        granted = await mixed.control_plane.admit(mixed.proposal(lease))
        now.update(admit=second)
        assert await mixed.control_plane.admit(mixed.proposal(lease)) == granted
    await assert_whole(bench)


async def test_a_grant_that_began_with_its_admission_has_begun_for_every_release(bench, nodes, releases):
    now = {}
    mixed = nodes(now.get)
    for other in releases:
        now.update(dict.fromkeys(("begin", "settle"), other), admit=releases[-1])
        lease = await mixed.lease()
        granted = await mixed.control_plane.admit(mixed.proposal(lease), begin=True)
        assert granted.begun
        now.update(admit=other)
        assert (await mixed.control_plane.admit(mixed.proposal(lease), begin=True)).grant == granted.grant
        assert (await mixed.begin(granted.grant, lease)).reason is Reason.GRANT_USED
        await mixed.settle(granted.grant, lease)
    assert standing(bench) == (len(releases), 0)
    await assert_whole(bench)


async def test_what_a_sweep_gave_back_has_expired_for_every_release(bench, nodes, releases):
    now = {}
    mixed = nodes(now.get)
    for admits, then in product(releases, repeat=2):
        now.update(admit=admits, begin=then, settle=then)
        lease = await mixed.lease()
        grant = await mixed.grant(lease)
        bench.behind.set_time("grants", "expires_at", -1, {"id": grant.id})
        await Recovery(bench.storage).sweep()
        assert standing(bench) == (0, 0)
        refused = await mixed.begin(grant, lease)
        assert (refused.accepted, refused.reason) == (False, Reason.GRANT_EXPIRED), (admits, then)
        if then > LONG_GONE:
            settled = await mixed.settle(grant, lease, OutcomeStatus.NOT_STARTED)
            assert settled.spent["calls"] == "0"
    await assert_whole(bench)


async def test_a_halt_ends_the_grants_of_every_release_for_every_release(bench, nodes, releases):
    now = {}
    mixed = nodes(now.get)
    for admits, begins in product(releases, repeat=2):
        now.update(admit=admits, begin=begins, settle=begins)
        lease = await mixed.lease()
        grant = await mixed.grant(lease)
        halt = await bench.halt(HaltScope.RUN, lease.run.id)
        refused = await mixed.begin(grant, lease)
        assert (refused.accepted, refused.reason) == (False, Reason.HALTED)
        assert isinstance(await mixed.control_plane.admit(mixed.proposal(lease, step_index=1)), Denied)
        await mixed.settle(grant, lease, OutcomeStatus.NOT_STARTED)
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
    assert standing(bench) == (0, 0)
    await assert_whole(bench)


@pytest.mark.parametrize(("revision", "newest"), TAKEN_BACK)
async def test_a_release_that_is_taken_back_and_repeated_meanwhile_changes_nothing_of_what_was_begun(
    bench, nodes, revision, newest
):
    before = newest - 1
    now = dict.fromkeys(("admit", "begin", "settle"), newest)
    mixed = nodes(now.get)
    leases = [await mixed.lease() for _ in range(4)]
    answers = [await mixed.control_plane.admit(mixed.proposal(lease), begin=True) for lease in leases]
    for answer, lease in zip(answers, leases, strict=True):
        assert answer.begun or (await mixed.begin(answer.grant, lease)).accepted
    grants = [answer.grant for answer in answers]
    settled = [await mixed.settle(grants[0], leases[0])]
    migrations.downgrade(bench.database.owner, revision)
    now.update(settle=before)
    settled += [await mixed.settle(grants[number], leases[number]) for number in (0, 1)]
    assert standing(bench) == (2, 2)
    migrations.upgrade(bench.database.owner)
    for now["settle"], number in [(before, 2), (newest, 3), (newest, 0), (newest, 1)]:
        settled.append(await mixed.settle(grants[number], leases[number]))
    assert settled == settled[:1] * len(settled)
    assert standing(bench) == (4, 0)
    await assert_whole(bench)


async def test_a_crowd_of_mixed_nodes_is_granted_exactly_the_budget(bench, nodes, releases):
    """Four times the budget is asked for at once, by calls that end in every way; nothing stays reserved."""
    dice = random.Random(7)  # a test that can be repeated
    budgets = {"run": {"EUR": "1000", "calls": "1000"}, "tenant": {"EUR": "1000", "calls": str(LIMIT)}}
    mixed = nodes(lambda _: dice.choice(releases), budgets=budgets, rate_limit=RATE, grant_seconds=600)
    ended = Counter()

    async def spend():
        lease = await mixed.lease(seconds=600)
        proposals = [mixed.proposal(lease, step_index=step) for step in range(4)]
        answers = [await mixed.control_plane.admit(each, begin=dice.random() < 0.5) for each in proposals]
        for answer in answers:
            if not isinstance(answer, Granted):
                assert answer.reason is Reason.BUDGET_EXCEEDED
                ended["refused"] += 1
                continue
            status = dice.choice([OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED])
            assert answer.begun or (await mixed.begin(answer.grant, lease)).accepted
            await mixed.settle(answer.grant, lease, status)
            ended["spent"] += 1

    crowd = max(1, int(4 * SOAK)) * LIMIT
    await asyncio.gather(*(spend() for _ in range(crowd)))
    assert ended == {"spent": LIMIT, "refused": 4 * crowd - LIMIT}
    assert standing(bench) == (LIMIT, 0)
    await assert_whole(bench)


async def test_who_prepared_a_statement_before_a_migration_is_told_to_send_it_again_and_then_answered(bench):
    run = await bench.run()
    bench.sql("ALTER TABLE budgets ALTER COLUMN spent TYPE numeric(20, 8)")
    async with open_pool(bench.database.app, max_size=1) as pool:
        runs = PostgresStorage(pool, None).runs
        for _ in range(10):
            before = await runs.budgets(bench.tenant, run.id)
        bench.sql("ALTER TABLE budgets ALTER COLUMN spent TYPE numeric(28, 8)")
        with pytest.raises(StorageUnavailable, match="was upgraded meanwhile"):
            await runs.budgets(bench.tenant, run.id)
        assert await runs.budgets(bench.tenant, run.id) == before


class TestAsk:
    """A node of a release that knows no asks meets one: it can deny it and time it out, and never answer or lose it."""

    @pytest.fixture
    async def ask(self, bench):
        asking = bench.with_policy(approval={"input": {}})
        lease = await asking.lease()
        pending = await asking.control_plane.ask(
            InputRequest(
                tenant_id=bench.tenant,
                run_id=lease.run.id,
                fencing_token=lease.fencing_token,
                step_index=0,
                attempt=1,
                step_id="ask",
                question="How many?",
                principal=lease.run.principal,
            )
        )
        return asking, lease.run, pending

    async def vote(self, bench, pending, decision, *, version=3, voter=None):
        """Vote as a node of that version does, whose commands say nothing of asks."""
        command = VoteCommand(
            tenant_id=bench.tenant,
            ticket_id=pending.ticket_id,
            vote=decision,
            voter=voter or bench.approver.user_id,
            actor=f"human:{voter or bench.approver.user_id}",
            comment="no",
            quorum=1,
            authority=("plm.hitl.resolve",),
            escalated=False,
            scope=None,
            scope_id=bench.tenant,
        )
        document = vote_json(command)
        del document["requester_may"]
        async with bench.storage.approvals._gateway.transaction(bench.tenant) as connection:
            call = f"SELECT engine_decide_ticket_v{version}(%s) AS answer".encode()
            return (await (await connection.execute(call, [jsonb(document, root="vote")])).fetchone())["answer"]

    async def standing(self, bench, run):
        (step,) = await bench.storage.runs.steps(bench.tenant, run.id)
        return await bench.state(run), step.state, (step.error or {}).get("reason"), step.grant_id

    @pytest.mark.parametrize("version", [2, 3])
    async def test_its_approval_is_refused_and_the_ask_stands(self, ask, version):
        bench, run, pending = ask
        answer = await self.vote(bench, pending, TicketDecision.APPROVE, version=version)
        assert (answer["status"], answer["reason"]) == ("refused", "ticket_kind")
        assert await self.standing(bench, run) == (RunState.AWAITING_APPROVAL, StepState.AWAITING_APPROVAL, None, None)
        plane = bench.control_plane
        given = await plane.provide_input(bench.tenant, pending.ticket_id, 3, approver=bench.approver)
        assert given.input == 3

    async def test_its_denial_ends_the_step(self, ask):
        bench, run, pending = ask
        assert (await self.vote(bench, pending, TicketDecision.DENY))["status"] == "decided"
        assert await self.standing(bench, run) == (RunState.QUEUED, StepState.DENIED, "input_denied", None)
        await assert_whole(bench)

    async def test_not_by_the_requester_whatever_the_policy_says(self, ask):
        bench, _, pending = ask
        answer = await self.vote(bench, pending, TicketDecision.DENY, voter=bench.requester.user_id)
        assert answer["reason"] == "separation_of_duties"

    async def test_its_sweep_ends_the_step_too(self, ask):
        bench, run, pending = ask
        bench.let_deadline_pass(pending)
        async with bench.storage.approvals._gateway.transaction(bench.tenant) as connection:
            sweep = "SELECT engine_time_out_tickets_v2(%s, %s, 'recovery')"
            await connection.execute(sweep, [bench.tenant, run.id])
        assert await self.standing(bench, run) == (RunState.QUEUED, StepState.DENIED, "input_expired", None)
        await assert_whole(bench)

    @pytest.mark.parametrize("revision", ["0051", "head"])
    async def test_where_its_function_is_back_an_escalation_is_asked_all_the_same(self, ask, revision):
        bench, run, _ = ask
        if revision != "head":
            migrations.downgrade(bench.database.owner, revision)
        lease = await bench.lease()
        pending = await bench.control_plane.ask(
            InputRequest(
                tenant_id=bench.tenant,
                run_id=lease.run.id,
                fencing_token=lease.fencing_token,
                step_index=0,
                attempt=2,
                step_id="s/escalation",
                question="Again?",
                principal=lease.run.principal,
                escalates=Failure(step=0, attempt=1, reason="attempts_exhausted", message="nothing came of it"),
            )
        )
        assert await self.standing(bench, lease.run) == (
            RunState.AWAITING_APPROVAL,
            StepState.AWAITING_APPROVAL,
            None,
            None,
        )
        said = ["escalation_raised"] if revision == "head" else []
        assert (await bench.kinds(lease.run))[2:] == [*said, "approval_requested"]
        assert (await bench.kinds(run))[2:] == ["approval_requested"], "an ask that says nothing of a failure is none"
        await bench.control_plane.provide_input(bench.tenant, pending.ticket_id, "again", approver=bench.approver)
        await assert_whole(bench)

    async def test_its_list_shows_one_as_it_shows_any_ticket(self, ask):
        bench, _, pending = ask
        await bench.control_plane.provide_input(bench.tenant, pending.ticket_id, 3, approver=bench.approver)
        ((tier, risk, state),) = bench.sql("SELECT tier, risk, state FROM approval_tickets")
        words = {*map(str, (*ActionTier, *RiskLevel, *TicketState))}
        assert {tier, risk, state} <= words
        assert bench.sql("SELECT FROM approval_votes") == [], "with a word that it would not know"
        known = {each.name for each in fields(ApprovalTicket)} - {"input"}
        columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'approval_tickets'"
        assert {name for (name,) in bench.sql(columns)} == known, "it reads every column there is"
