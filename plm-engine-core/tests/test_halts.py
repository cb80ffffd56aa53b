"""Halts: after one is committed nothing new starts in its scope, until it is lifted."""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import replace

import psycopg
import pytest
from plm_engine_core.control_plane import ControlPlane, Granted
from plm_engine_core.control_plane.errors import Conflict, FencingLost, Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.events.signals import NoSignals
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    OutcomeStatus,
    Reason,
    RunState,
    TicketDecision,
)

pytestmark = pytest.mark.every_storage

NOT_STARTED = OutcomeStatus.NOT_STARTED
GROUP = uuid.UUID(int=7)
NAMED = {
    HaltScope.SYSTEM: {},
    HaltScope.TENANT: {},
    HaltScope.AGENT: {"subject": "test"},
    HaltScope.RUN_GROUP: {"scope_id": GROUP},
    HaltScope.RUN: {},
    HaltScope.CAPABILITY: {"subject": "thing.read"},
}


async def park(bench, run=None):
    """Have a run worker take up a queued run under a standing halt."""
    run = run or await bench.run()
    assert await bench.storage.runs.take(bench.tenant, run.id, owner="w", seconds=60) is None
    return run, await bench.state(run)


async def drive_into(bench, lease, **changes):
    """Propose under a standing halt, and park the run as its driver does."""
    denied = await bench.control_plane.admit(bench.proposal(lease, **changes))
    assert denied.reason is Reason.HALTED
    return await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w", reason="halted"
    )


async def lift(bench, halt):
    return await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)


@pytest.mark.parametrize("taken", [False, True], ids=["queued", "in the hands of a worker"])
@pytest.mark.parametrize("scope", list(HaltScope))
async def test_a_halt_parks_its_runs_and_lifting_it_queues_them_in_the_same_commit(bench, scope, taken):
    run = await bench.run(run_group_id=GROUP)
    lease = await bench.lease(run) if taken or scope is HaltScope.CAPABILITY else None
    halt = await bench.halt(scope, **({"scope_id": run.id} if scope is HaltScope.RUN else NAMED[scope]))
    left = await drive_into(bench, lease) if lease else (await park(bench, run))[1]
    assert left is RunState.HALTED
    before = bench.deliveries(run)
    assert await Recovery(bench.storage).sweep() == 0
    lifted = await lift(bench, halt)
    assert lifted.lifted_by == bench.approver.user_id
    assert await bench.state(run) is RunState.QUEUED
    assert bench.deliveries(run) == before + 1
    assert (await bench.kinds(run))[-2:] == ["run_parked", "run_resumed"]
    assert await lift(bench, halt) == lifted
    assert bench.deliveries(run) == before + 1
    lease = await bench.lease(run)
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease, attempt=2)), Granted)


@pytest.mark.parametrize("scope", [HaltScope.AGENT, HaltScope.RUN_GROUP, HaltScope.CAPABILITY])
async def test_what_a_halt_is_not_about_goes_on(bench, scope):
    named = {"agent": {"name": "another"}, "run_group_id": uuid.UUID(int=8)}
    await bench.run(run_group_id=GROUP)
    other = await bench.lease(await bench.run(**named))
    await bench.halt(scope, **NAMED[scope])
    capability = "thing.fire" if scope is HaltScope.CAPABILITY else "thing.read"
    assert isinstance(await bench.control_plane.admit(bench.proposal(other, capability=capability)), Granted)


async def test_a_run_parked_by_its_capability_stays_while_another_halt_is_lifted(bench):
    lease = await bench.lease()
    capability = await bench.halt(HaltScope.CAPABILITY, subject="thing.read")
    tenant = await bench.halt(HaltScope.TENANT)
    await drive_into(bench, lease)
    await lift(bench, tenant)
    assert await bench.state(lease.run) is RunState.HALTED
    assert await Recovery(bench.storage).sweep() == 0
    await lift(bench, capability)
    assert await bench.state(lease.run) is RunState.QUEUED


class TestWhatItEnds:
    """Unused grants are revoked, calls in flight are told of, and the record says what became of them."""

    async def test_a_grant_from_before_begins_neither_under_the_halt_nor_after_it(self, bench):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        halt = await bench.halt(HaltScope.TENANT)
        assert (halt.calls.revoked, halt.calls.in_flight) == (1, 0)
        assert (await bench.begin(grant, lease)).reason is Reason.HALTED
        await lift(bench, halt)
        begun = await bench.begin(grant, lease)
        assert (begun.accepted, begun.reason) == (False, Reason.HALTED)
        with pytest.raises(Conflict):
            await bench.settle(grant, lease)
        await bench.settle(grant, lease, OutcomeStatus.NOT_STARTED)
        assert await bench.budget(lease.run, "tenant", BudgetUnit.CALLS) == (0, 0)

    @pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e9])
    def test_a_bound_that_is_none_is_promised_to_nobody(self, bench, seconds):
        with pytest.raises(InvalidRequest, match=f"not {seconds}$") as caught:
            ControlPlane(
                policy=bench.control_plane.policy,
                registry=bench.control_plane.registry,
                storage=bench.storage,
                cancel_seconds=seconds,
            )
        assert caught.value.field == "cancel_seconds"

    async def test_the_end_of_the_calls_in_flight_is_seen_in_its_record(self, bench):
        leases = [await bench.lease() for _ in range(3)]
        grants = [await bench.begun(lease) for lease in leases]
        await bench.settle(grants[0], leases[0])
        halt = await bench.halt(HaltScope.TENANT)
        assert halt.cancel_seconds == 30.0
        assert (halt.calls.in_flight, halt.calls.open, halt.calls.last_ended_at) == (2, 2, None)
        for number in (1, 2):
            beat = await bench.storage.runs.renew(
                bench.tenant, leases[number].run.id, fencing_token=leases[number].fencing_token, seconds=60
            )
            assert beat.halt["reason"] == "stop"
            await bench.settle(grants[number], leases[number], OutcomeStatus.CANCELLED)
            halt = await bench.storage.halts.get(bench.tenant, halt.id)
            assert (halt.calls.in_flight, halt.calls.open) == (2, 2 - number)
            assert halt.calls.last_ended_at > halt.triggered_at

    @pytest.mark.parametrize("scope", list(HaltScope))
    async def test_calls_in_flight_hear_of_a_halt_of_any_scope(self, bench, scope):
        lease = await bench.lease(await bench.run(run_group_id=GROUP))
        await bench.begun(lease)
        halt = await bench.halt(scope, **({"scope_id": lease.run.id} if scope is HaltScope.RUN else NAMED[scope]))
        beat = await bench.storage.runs.renew(bench.tenant, lease.run.id, fencing_token=lease.fencing_token, seconds=60)
        assert (beat.halt["scope"], halt.calls.in_flight) == (scope.value, 1)

    @pytest.mark.parametrize("scope", list(HaltScope))
    async def test_whoever_holds_a_run_in_it_is_woken_once_the_calls_are_in_its_record(self, bench, scope):
        lease = await bench.lease(await bench.run(run_group_id=GROUP))
        await bench.begun(lease)
        told = []

        class Recording(NoSignals):
            async def interrupt(self, tenant_id, run_id):
                (halt,) = await bench.storage.halts.list(bench.tenant, limit=9, before=None, standing=True)
                told.append((tenant_id, run_id, halt.calls.in_flight))

        core = bench.control_plane
        plane = ControlPlane(policy=core.policy, registry=core.registry, storage=core.storage, signals=Recording())
        named = {"scope_id": lease.run.id} if scope is HaltScope.RUN else NAMED[scope]
        await replace(bench, control_plane=plane).halt(scope, **named)
        everywhere = None if scope is HaltScope.SYSTEM else bench.tenant
        assert told == [(everywhere, lease.run.id if scope is HaltScope.RUN else None, 1)]

    async def test_a_system_halt_ends_the_grants_of_every_tenant(self, bench):
        neighbour = bench.other()
        lease = await neighbour.lease()
        grant = await neighbour.grant(lease)
        halt = await bench.halt(HaltScope.SYSTEM)
        assert [each["state"] for each in bench.behind.rows("grants") if each["id"] == grant.id] == ["revoked"]
        assert (await bench.storage.halts.get(neighbour.tenant, halt.id)).calls.revoked == 1
        assert (await bench.storage.halts.get(bench.tenant, halt.id)).calls.revoked == 0
        refused = await neighbour.control_plane.admit(neighbour.proposal(lease, step_index=1))
        assert refused.reason is Reason.HALTED

    async def test_a_system_halt_ends_the_grants_of_the_other_tenants_where_one_is_damaged(self, bench, monkeypatch):
        neighbour = bench.other()
        grants = [await each.grant(await each.lease()) for each in (bench, neighbour)]
        end_halted = bench.storage.halts.end_halted

        async def failing(tenant_id):
            if tenant_id == bench.tenant:
                raise RuntimeError("damaged")
            return await end_halted(tenant_id)

        monkeypatch.setattr(bench.storage.halts, "end_halted", failing)
        assert (await bench.halt(HaltScope.SYSTEM)).lifted_at is None
        states = {each["id"]: each["state"] for each in bench.behind.rows("grants")}
        assert [states[grant.id] for grant in grants] == ["issued", "revoked"]

    async def test_what_could_not_be_ended_at_once_is_ended_by_recovery(self, bench, monkeypatch, caplog):
        lease = await bench.lease()
        grant = await bench.grant(lease)
        end_halted = bench.storage.halts.end_halted

        async def failing(tenant_id):
            raise RuntimeError("gone")

        monkeypatch.setattr(bench.storage.halts, "end_halted", failing)
        halt = await bench.halt(HaltScope.TENANT)
        assert "could not be ended yet" in caplog.text
        assert (await bench.begin(grant, lease)).reason is Reason.HALTED
        monkeypatch.setattr(bench.storage.halts, "end_halted", end_halted)
        await asyncio.gather(*(Recovery(bench.storage).sweep() for _ in range(3)))
        assert (await bench.storage.halts.get(bench.tenant, halt.id)).calls.revoked == 1
        assert await bench.storage.halts.unfinished(9) == []


STREAM_DAMAGE = {
    "its head is that of an earlier event": ["UPDATE event_streams SET last_seq = 0 WHERE stream = 'tenant'"],
    "its head has no next": ["UPDATE event_streams SET last_seq = 9223372036854775807 WHERE stream = 'tenant'"],
    "it takes no event": [
        "CREATE FUNCTION damage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'damaged'; END $$",
        "CREATE TRIGGER a BEFORE INSERT ON events FOR EACH ROW WHEN (NEW.stream = 'tenant') EXECUTE FUNCTION damage()",
    ],
}


@pytest.mark.postgres_only
class TestDamage:
    """A halt stands whatever state other rows are in."""

    async def test_a_grant_that_cannot_be_changed_keeps_no_other_from_being_revoked(self, bench, caplog):
        leases = [await bench.lease() for _ in range(3)]
        grants = [await bench.grant(lease) for lease in leases]
        bench.sql(
            f"CREATE FUNCTION damage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = '{grants[1].id}' THEN "
            "RAISE 'damaged'; END IF; RETURN NEW; END $$"
        )
        bench.sql("CREATE TRIGGER damage BEFORE UPDATE ON grants FOR EACH ROW EXECUTE FUNCTION damage()")
        halt = await bench.halt(HaltScope.TENANT)
        assert halt.lifted_at is None
        assert "could not end 1 grants or approval scopes" in caplog.text
        states = dict(bench.sql("SELECT id, state FROM grants"))
        assert [states[grant.id] for grant in grants] == ["revoked", "issued", "revoked"]
        for grant, lease in zip(grants, leases, strict=True):
            assert (await bench.begin(grant, lease)).reason is Reason.HALTED

    @pytest.mark.parametrize("damage", STREAM_DAMAGE)
    async def test_a_damaged_stream_of_the_tenant_does_not_keep_it_from_standing(self, bench, caplog, damage):
        await lift(bench, await bench.halt(HaltScope.TENANT))
        for statement in STREAM_DAMAGE[damage]:
            bench.sql(statement)
        lease = await bench.lease()
        await bench.halt(HaltScope.TENANT)
        assert "its event is missing" in caplog.text
        assert (await bench.control_plane.admit(bench.proposal(lease))).reason is Reason.HALTED

    async def test_a_damaged_run_does_not_keep_a_halt_from_being_lifted(self, bench, caplog):
        halt = await bench.halt(HaltScope.TENANT)
        runs = [(await park(bench))[0] for _ in range(3)]
        damage = "UPDATE event_streams SET last_seq = last_seq {} WHERE stream = %s"
        bench.sql(damage.format("- 1"), run_stream(runs[1].id))
        assert (await lift(bench, halt)).lifted_at is not None
        assert [await bench.state(run) for run in runs] == [RunState.QUEUED, RunState.HALTED, RunState.QUEUED]
        assert [bench.deliveries(run) for run in runs] == [2, 1, 2]
        assert "a run could not be queued when its halt was lifted" in caplog.text
        assert await Recovery(bench.storage).sweep() == 0
        bench.sql(damage.format("+ 1"), run_stream(runs[1].id))
        assert await Recovery(bench.storage).sweep() == 1
        assert await bench.state(runs[1]) is RunState.QUEUED


async def test_a_halt_names_something_that_exists(bench):
    await bench.run()
    for named in (
        {"scope": HaltScope.AGENT, "subject": "tset"},
        {"scope": HaltScope.CAPABILITY, "subject": "thing.raed"},
        {"scope": HaltScope.RUN_GROUP, "scope_id": GROUP},
    ):
        with pytest.raises(NotFound):
            await bench.halt(**named)
    for named in ({"scope": HaltScope.AGENT}, {"scope": HaltScope.TENANT, "subject": "test"}):
        with pytest.raises(InvalidRequest, match="subject"):
            await bench.halt(**named)


async def test_halts_are_listed_newest_first_page_by_page(bench):
    await bench.run()
    halts = [await bench.halt(scope, **NAMED[scope]) for scope in (HaltScope.SYSTEM, HaltScope.TENANT, HaltScope.AGENT)]
    await lift(bench, halts[1])
    seen, before = [], None
    while page := await bench.storage.halts.list(bench.tenant, limit=1, before=before, standing=False):
        seen += [each.id for each in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == [each.id for each in reversed(halts)]
    standing = await bench.storage.halts.list(bench.tenant, limit=9, before=None, standing=True)
    assert [each.id for each in standing] == [halts[2].id, halts[0].id]


async def test_a_run_under_two_halts_goes_on_after_the_second_is_lifted(bench):
    run = await bench.run()
    one, two = await bench.halt(HaltScope.RUN, run.id), await bench.halt(HaltScope.TENANT)
    await park(bench, run)
    await lift(bench, one)
    assert await bench.state(run) is RunState.HALTED
    await lift(bench, two)
    assert await bench.state(run) is RunState.QUEUED


async def test_two_lifts_at_once_do_not_leave_a_run_behind(bench):
    for _ in range(5):
        run = await bench.run()
        halts = [await bench.halt(HaltScope.RUN, run.id), await bench.halt(HaltScope.TENANT)]
        await park(bench, run)
        await asyncio.gather(*(lift(bench, halt) for halt in halts))
        assert await bench.state(run) is RunState.QUEUED


async def test_a_halt_lifted_before_the_run_was_parked_does_not_park_it(bench):
    lease = await bench.lease()
    halt = await bench.halt(HaltScope.TENANT)
    await bench.control_plane.admit(bench.proposal(lease))
    await lift(bench, halt)
    before = bench.deliveries(lease.run)
    left = await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w"
    )
    assert left is await bench.state(lease.run) is RunState.QUEUED
    assert bench.deliveries(lease.run) == before + 1


async def test_parking_and_lifting_at_once_never_leave_a_run_parked_without_a_halt(bench):
    for _ in range(25):
        lease = await bench.lease()
        halt = await bench.halt(HaltScope.TENANT)
        parking = bench.control_plane.finish(
            lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w"
        )
        await asyncio.gather(parking, lift(bench, halt))
        assert await bench.state(lease.run) is RunState.QUEUED


async def test_runs_of_other_tenants_come_back_from_a_system_halt_by_recovery(bench):
    neighbour = bench.other()
    halt = await bench.halt(HaltScope.SYSTEM)
    run, _ = await park(neighbour)
    await lift(bench, halt)
    assert await neighbour.state(run) is RunState.HALTED
    assert await Recovery(bench.storage).sweep() == 1
    assert await neighbour.state(run) is RunState.QUEUED
    assert (await neighbour.kinds(run))[-1] == "run_resumed"


async def test_halting_twice_answers_the_halt_that_stands(bench):
    first = await bench.halt(HaltScope.TENANT, reason="one")
    assert await bench.halt(HaltScope.TENANT, reason="two") == first
    many = await asyncio.gather(*(bench.halt(HaltScope.SYSTEM) for _ in range(8)))
    assert len({halt.id for halt in many}) == 1


async def test_each_halt_of_a_scope_has_a_higher_epoch(bench):
    epochs = []
    for _ in range(3):
        halt = await bench.halt(HaltScope.TENANT)
        epochs.append(halt.epoch)
        await lift(bench, halt)
    assert epochs == sorted(set(epochs))


async def test_a_halt_elsewhere_does_not_matter(bench):
    other = bench.behind.new_tenant()
    await bench.in_tenant(other).halt(HaltScope.TENANT)
    await bench.halt(HaltScope.RUN, (await bench.run()).id)
    lease = await bench.lease()
    assert isinstance(await bench.control_plane.admit(bench.proposal(lease)), Granted)


async def test_no_grant_and_no_begin_is_committed_after_a_committed_halt(bench):
    """Eight admit and begin without pause while a halt is committed; then the database's own times are looked at."""
    bench = bench.with_policy(budgets={"run": {"EUR": 999, "calls": 999}, "tenant": {"EUR": 999, "calls": 999}})
    leases = [await bench.lease() for _ in range(8)]
    warm, halted = asyncio.Event(), asyncio.Event()
    after_halt = []

    async def admitter(lease):
        for index in range(500):
            known = halted.is_set()
            admission = await bench.control_plane.admit(bench.proposal(lease, step_index=index, step_id=f"s{index}"))
            if isinstance(admission, Granted):
                begun = await bench.begin(admission.grant, lease)
                after_halt.append(known)
                if begun.accepted:
                    await bench.settle(admission.grant, lease)
            else:
                assert admission.reason is Reason.HALTED
                return
            if index == 2:
                warm.set()
        raise AssertionError("the halt was never seen")

    async def halter():
        await warm.wait()
        await bench.halt(HaltScope.TENANT)
        halted.set()

    await asyncio.gather(halter(), *(admitter(lease) for lease in leases))
    assert True not in after_halt
    (halt,) = bench.behind.rows("halts")
    grants = bench.behind.rows("grants")
    assert max(grant["issued_at"] for grant in grants) < halt["triggered_at"]
    assert max(grant["begun_at"] for grant in grants if grant["begun_at"]) < halt["triggered_at"]


# What was committed while a halt stood, by the database's own times.
_LATE_GRANTS = """
SELECT count(*) FROM halts AS h JOIN grants AS g
    ON (g.issued_at > h.triggered_at AND g.issued_at < COALESCE(h.lifted_at, 'infinity'))
    OR (g.begun_at > h.triggered_at AND g.begun_at < COALESCE(h.lifted_at, 'infinity'))
"""
_LATE_TAKES = """
SELECT count(*) FROM halts AS h JOIN events AS e ON e.kind = 'run_taken'
    AND e.occurred_at > h.triggered_at AND e.occurred_at < COALESCE(h.lifted_at, 'infinity')
"""
_STATES = "SELECT state, count(*) FROM run_states GROUP BY state"


class Crowd:
    """Everybody who could bring a run back, each without pause, over the runs of one tenant."""

    def __init__(self, bench):
        self.bench = bench
        self.resumed = 0
        self.warm, self.halted, self.over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.moved = asyncio.Event()

    async def call(self, lease, index):
        """One call to its end; whether it was let through."""
        admission = await self.bench.control_plane.admit(
            self.bench.proposal(lease, step_index=index, step_id=f"s{index}")
        )
        if not isinstance(admission, Granted):
            assert admission.reason is Reason.HALTED
            return False
        begun = await self.bench.begin(admission.grant, lease)
        await self.bench.settle(admission.grant, lease, OutcomeStatus.SUCCEEDED if begun.accepted else NOT_STARTED)
        self.moved.set()
        return True

    async def give_back(self, lease, state):
        await self.bench.control_plane.finish(lease.run, fencing_token=lease.fencing_token, state=state, actor="worker")

    async def admit(self, lease):
        """Call after call, through every short halt, until the halt that stays is known."""
        index = 0
        while await self.call(lease, index) or not self.halted.is_set():
            index += 1
        await self.give_back(lease, RunState.HALTED)

    async def resume(self, runs, owner):
        """Take whatever can be taken, until a whole round came after the halt."""
        after = False
        while not after:
            after = self.halted.is_set()
            for run in runs:
                lease = await self.bench.storage.runs.take(self.bench.tenant, run.id, owner=owner, seconds=60)
                if lease is not None:
                    self.resumed += 1
                    if self.resumed == 8:
                        self.warm.set()
                    through = await self.call(lease, 10 + lease.fencing_token)
                    await self.give_back(lease, RunState.QUEUED if through else RunState.HALTED)

    async def sweep(self):
        recovery = Recovery(self.bench.storage, patience_seconds=0)
        while not self.over.is_set():
            await recovery.sweep()

    async def halt_and_lift(self):
        """A second halt over the same runs, again and again; until the one that stays, something happens between."""
        while not self.over.is_set():
            await lift(self.bench, await self.bench.halt(HaltScope.AGENT, subject="test"))
            if not self.halted.is_set():
                self.moved.clear()
                await self.moved.wait()

    def stay_halted(self):
        self.halted.set()
        self.moved.set()

    async def race(self, *racers):
        """Have them all at it until the racers are through; answers what the first one does."""

        async def racing():
            first, *_ = await asyncio.gather(*racers)
            self.over.set()
            return first

        first, *_ = await asyncio.gather(racing(), self.sweep(), self.halt_and_lift())
        return first


@pytest.mark.postgres_only
async def test_many_runs_halted_in_one_call_while_others_admit_and_decide(bench):
    """Runs are queued, wait for approval and work.

    Meanwhile eight clients admit, approvals come in, two workers resume what waits, recovery sweeps, and a second halt
    is triggered and lifted. At the end the halt is lifted while that second one is triggered once more.
    """
    wide = {"EUR": 99_999, "calls": 99_999}
    bench = bench.with_policy(budgets={"run": wide, "tenant": wide}, rate_limit={"per_second": 1e6, "burst": 1e6})
    number = max(48, int(1000 * float(os.environ.get("SOAK", "0.05"))))
    queued = [await bench.run() for _ in range(number // 2)]
    asked = [await bench.ask() for _ in range(number - len(queued) - 8)]
    leases = [await bench.lease() for _ in range(8)]
    waiting = [*queued, *(lease.run for lease, _ in asked)]
    everybody = [*waiting, *(lease.run for lease in leases)]
    crowd = Crowd(bench)

    async def decide():
        for _, pending in asked:
            await bench.decide(pending, TicketDecision.APPROVE)

    async def halt():
        await crowd.warm.wait()
        made = await bench.halt(HaltScope.TENANT)
        crowd.stay_halted()
        return made

    made = await crowd.race(
        halt(),
        decide(),
        crowd.resume(waiting, "one"),
        crowd.resume(waiting[::-1], "two"),
        *(crowd.admit(lease) for lease in leases),
    )
    assert bench.sql(_LATE_GRANTS) == bench.sql(_LATE_TAKES) == [(0,)]
    for run in everybody:
        await park(bench, run)
    assert dict(bench.sql(_STATES)) == {"halted": number}

    crowd.halted.clear()

    async def halt_again():
        again = await bench.halt(HaltScope.AGENT, subject="test")
        crowd.stay_halted()
        return again

    again, *_ = await asyncio.gather(
        halt_again(), lift(bench, made), crowd.resume(everybody, "one"), crowd.resume(everybody[::-1], "two")
    )
    assert bench.sql(_LATE_GRANTS) == bench.sql(_LATE_TAKES) == [(0,)]
    for run in everybody:
        await park(bench, run)
    assert dict(bench.sql(_STATES)) == {"halted": number}
    await lift(bench, again)
    assert dict(bench.sql(_STATES)) == {"queued": number}
    assert bench.sql("SELECT count(*) FROM budgets WHERE reserved <> 0") == [(0,)]


@pytest.mark.postgres_only
async def test_a_halt_waits_for_an_admission_that_is_not_committed_yet(bench):
    lease = await bench.lease()
    async with bench.control_plane.storage.admission._gateway.transaction(bench.tenant) as connection:
        await bench.control_plane.admit(bench.proposal(lease), connection=connection)
        halting = asyncio.create_task(bench.halt(HaltScope.TENANT))
        done, _ = await asyncio.wait({halting}, timeout=0.3)  # a bound on how long a wrong halt would go unnoticed
        assert not done
        assert bench.sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == [(1,)]
    await halting


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")


WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND NOT granted"
HELD = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"


@pytest.mark.postgres_only
@pytest.mark.parametrize("begin", [False, True])
async def test_an_admission_that_waits_for_a_halt_scope_holds_no_run_and_its_lease_goes_on_running_out(bench, begin):
    await bench.grant(await bench.lease(), step_index=1)  # so that nothing else is waited for
    lease = await bench.lease(seconds=1.5)
    with psycopg.connect(bench.database.admin) as halting:
        halting.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"halt/run/{lease.run.id}"])
        admission = asyncio.create_task(bench.control_plane.admit(bench.proposal(lease), begin=begin))
        await until(lambda: bench.sql(WAITING) == [(1,)])
        named = (bench.tenant, lease.run.id)
        run = "FROM run_states WHERE tenant_id = %s AND run_id = %s"
        assert bench.sql(f"SELECT 1 {run} FOR UPDATE NOWAIT", *named) == [(1,)]
        await until(lambda: bench.sql(f"SELECT lease_expires_at < clock_timestamp() {run}", *named) == [(True,)])
        assert not admission.done()
    with pytest.raises(FencingLost):
        await admission
    assert bench.sql("SELECT 1 FROM grants WHERE run_id = %s", lease.run.id) == []


@pytest.mark.postgres_only
async def test_an_admission_that_waits_for_its_run_holds_its_halt_scopes_already(bench):
    lease = await bench.lease()
    with psycopg.connect(bench.database.admin) as holder:
        holder.execute("SELECT 1 FROM run_states WHERE run_id = %s FOR UPDATE", [lease.run.id])
        admission = asyncio.create_task(bench.control_plane.admit(bench.proposal(lease)))
        await until(lambda: bench.sql("SELECT 1 FROM pg_locks WHERE NOT granted") == [(1,)])
        assert bench.sql(HELD) == [(6,)]  # policy, system, tenant, agent, run and capability: it has no run group
        assert not admission.done()
    assert isinstance(await admission, Granted)


@pytest.mark.parametrize(
    ("scope", "scopes", "missing"),
    [
        (HaltScope.TENANT, set(), "plm.halt"),
        (HaltScope.TENANT, {"plm.halt.system"}, "plm.halt"),
        (HaltScope.SYSTEM, {"plm.halt"}, "plm.halt.system"),
    ],
)
async def test_halting_and_lifting_need_the_scope_of_the_halt(bench, scope, scopes, missing):
    weak = replace(bench.approver, scopes=frozenset(scopes))
    with pytest.raises(Forbidden) as caught:
        await bench.control_plane.halt(bench.tenant, scope, None, reason="x", by=weak)
    assert caught.value.missing_scopes == (missing,)
    halt = await bench.halt(scope)
    with pytest.raises(Forbidden):
        await bench.control_plane.lift(bench.tenant, halt.id, by=weak)
    assert isinstance(halt.epoch, int)


async def test_a_halt_needs_a_reason_and_a_run_of_this_tenant(bench):
    with pytest.raises(InvalidRequest, match="needs a reason"):
        await bench.halt(HaltScope.TENANT, reason="  ")
    for scope, target in ((HaltScope.RUN, None), (HaltScope.TENANT, new_id()), (HaltScope.SYSTEM, new_id())):
        with pytest.raises(InvalidRequest, match="scope_id"):
            await bench.halt(scope, target)
    other = bench.behind.new_tenant()
    run = await bench.run()
    with pytest.raises(NotFound):
        await bench.in_tenant(other).halt(HaltScope.RUN, run.id)
    halt = await bench.halt(HaltScope.RUN, run.id)
    with pytest.raises(NotFound):
        await lift(bench.in_tenant(other), halt)


async def test_halts_are_events_of_the_tenant(bench):
    await lift(bench, await bench.halt(HaltScope.TENANT, reason="smoke"))
    events = await bench.storage.events.read(bench.tenant, "tenant")
    assert [event.kind for event in events] == ["halt_triggered", "halt_lifted"]
    assert events[0].data["reason"] == "smoke"


@pytest.mark.parametrize("scope", HaltScope)
async def test_a_drill_says_what_the_halt_then_meets_and_stops_nothing(bench, scope):
    lease, elsewhere = await bench.lease(), await bench.lease(await bench.run(agent={"name": "another"}))
    await bench.grant(lease)
    begun = await bench.begun(lease, step_index=1)
    await bench.grant(elsewhere, capability="thing.fire")
    await bench.run(agent={"name": "another"})
    await bench.ask(await bench.lease(await bench.run(agent={"name": "another"})))
    ended = await bench.lease()
    await bench.control_plane.finish(ended.run, fencing_token=ended.fencing_token, state=RunState.FAILED, actor="x")
    group = uuid.uuid4()
    bench.behind.set_rows("run_states", {"run_id": lease.run.id}, run_group_id=group)
    scope_id = {HaltScope.RUN: lease.run.id, HaltScope.RUN_GROUP: group}.get(scope)
    subject = {HaltScope.AGENT: "test", HaltScope.CAPABILITY: "thing.read"}.get(scope)
    before = bench.behind.rows("events")
    told = await bench.control_plane.drill(bench.tenant, scope, scope_id, subject=subject, by=bench.approver)
    wide = {RunState.RUNNING: 2, RunState.QUEUED: 1, RunState.AWAITING_APPROVAL: 1}
    everything = scope in (HaltScope.SYSTEM, HaltScope.TENANT)
    assert told.runs == (wide if everything else {RunState.RUNNING: 1})
    assert (told.grants, told.calls) == (2 if everything else 1, 1)
    assert bench.behind.rows("events") == before
    assert (await bench.begin(await bench.grant(lease, step_index=2), lease)).accepted
    await bench.settle(begun, lease)
    halt = await bench.halt(scope, scope_id, subject=subject)
    assert (halt.calls.revoked, halt.calls.in_flight) == (told.grants, told.calls)


async def test_a_drill_is_refused_as_its_halt_would_be(bench):
    plane, tenant = bench.control_plane, bench.tenant
    weak = replace(bench.approver, scopes=frozenset({"plm.halt"}))
    with pytest.raises(Forbidden, match=r"plm\.halt\.system"):
        await plane.drill(tenant, HaltScope.SYSTEM, by=weak)
    for scope, named in (
        (HaltScope.AGENT, {"subject": "tset"}),
        (HaltScope.CAPABILITY, {"subject": "thing.raed"}),
        (HaltScope.RUN, {"scope_id": uuid.uuid4()}),
    ):
        with pytest.raises(NotFound):
            await plane.drill(tenant, scope, **named, by=bench.approver)
    with pytest.raises(InvalidRequest):
        await plane.drill(tenant, HaltScope.RUN, by=bench.approver)
    for scope in (HaltScope.TENANT, HaltScope.SYSTEM):
        with pytest.raises(NotFound, match="tenant"):
            await plane.drill(uuid.uuid4(), scope, by=bench.approver)
