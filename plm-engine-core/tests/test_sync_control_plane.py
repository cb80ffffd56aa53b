"""The synchronous face: the same core and the same answers, from any thread, and never where it would block a loop."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from plm_engine_core.control_plane import ControlPlane, Denied, Granted, Pending, Proposal, RunRequest, SyncControlPlane
from plm_engine_core.control_plane.errors import Conflict, NotFound, StorageUnavailable
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.loop_thread import LoopThread
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import BudgetUnit, Reason, TicketDecision
from plm_shared.testing.databases import create_tenants

WAIT = 60  # seconds, a bound for what ends at once


class Both:
    """A core behind the synchronous face, for one tenant; the asynchronous face of the same core is `sync.call`."""

    def __init__(self, sync, tenant, people):
        self.sync = sync
        self.tenant = tenant
        self.requester, self.approver = people

    def lease(self, owner="worker"):
        request = RunRequest(
            tenant_id=self.tenant, run_id=new_id(), agent={"name": "a"}, input={}, trace_id=uuid.uuid4().hex
        )
        run, _ = self.sync.create_run(request, principal=self.requester)
        return self.sync.call(lambda core: core.storage.runs.take(self.tenant, run.id, owner=owner, seconds=600))

    def proposal(self, lease, step=0, **changes):
        values = {"capability": "thing.read", "resource": "thing/1", "arguments": {"name": "one"}, **changes}
        return Proposal(
            tenant_id=self.tenant,
            run_id=lease.run.id,
            fencing_token=lease.fencing_token,
            step_index=step,
            attempt=1,
            step_id=f"s{step}",
            principal=self.requester,
            **values,
        )


@pytest.fixture(params=["memory", "postgres"])
def both(request, make_policy, registry, people):
    """The synchronous face of each storage."""
    policy = make_policy(
        budgets={"run": {"EUR": "1000", "calls": "1000"}, "tenant": {"EUR": "1000", "calls": "200"}},
        rate_limit={"per_second": 1_000_000, "burst": 1_000_000},
    )
    if request.param == "memory":
        storage = MemoryStorage()
        opened, tenant = (
            ControlPlane(policy=policy, registry=registry, storage=storage),
            storage.add_tenant(uuid.uuid4()),
        )
    else:
        database = request.getfixturevalue("engine_database")
        (tenant,) = create_tenants(database, "acme")
        opened = opened_on(database, policy, registry)
    with SyncControlPlane(opened) as sync:
        yield Both(sync, tenant, people)


class NoDelivery:
    async def enqueue(self, connection, tenant_id, run_id, *, after_seconds=0.0):
        """Nobody drives."""


@asynccontextmanager
async def opened_on(database, policy, registry) -> AsyncIterator[ControlPlane]:
    async with open_pool(database.app, max_size=8) as pool:
        yield ControlPlane(policy=policy, registry=registry, storage=PostgresStorage(pool, NoDelivery()))


@pytest.fixture
def sync(make_policy, registry):
    with SyncControlPlane(ControlPlane(policy=make_policy(), registry=registry, storage=MemoryStorage())) as plane:
        yield plane


def test_it_has_every_method_of_the_core_with_the_same_parameters():
    for name, method in inspect.getmembers(ControlPlane, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            twin = getattr(SyncControlPlane, name)
            assert inspect.signature(twin) == inspect.signature(method), name
            assert twin.__doc__ == method.__doc__
            assert not inspect.iscoroutinefunction(twin)


def test_a_budget_of_two_hundred_grants_two_hundred_of_eight_hundred(both):
    """Eight threads, through either face; what is granted, reserved and recorded is the same number."""
    leases = [both.lease(f"w{n}") for n in range(8)]

    def hundred(number):
        lease = leases[number]
        if number % 2:
            return [both.sync.admit(both.proposal(lease, step)) for step in range(100)]
        return both.sync.call(lambda core: _admitted(core, [both.proposal(lease, step) for step in range(100)]))

    with ThreadPoolExecutor(8) as threads:
        answers = [answer for part in threads.map(hundred, range(8)) for answer in part]
    assert len(answers) == 800
    assert sum(isinstance(answer, Granted) for answer in answers) == 200
    assert {answer.reason for answer in answers if isinstance(answer, Denied)} == {Reason.BUDGET_EXCEEDED}
    budgets = both.sync.call(lambda core: core.storage.runs.budgets(both.tenant, leases[0].run.id))
    (calls,) = [each for each in budgets if each.scope.value == "tenant" and each.unit == BudgetUnit.CALLS]
    assert (calls.spent, calls.reserved) == (0, 200)
    granted = [
        event
        for lease in leases
        for event in both.sync.call(
            lambda core, run=lease.run: core.storage.events.read(run.tenant_id, f"run/{run.id}")
        )
        if event.kind == "step_granted"
    ]
    assert len(granted) == 200


async def _admitted(core, proposals):
    return [await core.admit(proposal) for proposal in proposals]


def test_of_thirty_racing_approve_and_deny_pairs_each_has_one_winner_and_the_loser_is_told(both):
    tickets = []
    for _ in range(30):
        lease = both.lease()
        pending = both.sync.admit(both.proposal(lease, capability="thing.write"))
        assert isinstance(pending, Pending)
        tickets.append((lease.run.id, pending.ticket_id))

    def decide(ticket_id, decision):
        who = replace(both.approver, user_id=uuid.uuid4())
        try:
            return both.sync.decide(both.tenant, ticket_id, decision, approver=who).state
        except Conflict as error:
            return error.reason

    with ThreadPoolExecutor(8) as threads:
        races = [
            [threads.submit(decide, ticket_id, decision) for decision in TicketDecision] for _, ticket_id in tickets
        ]
        for race in races:
            answers = [future.result() for future in race]
            assert answers.count("already_decided") == 1
    for run_id, _ in tickets:
        events = both.sync.call(lambda core, run_id=run_id: core.storage.events.read(both.tenant, f"run/{run_id}"))
        assert Counter(event.kind for event in events)["approval_decided"] == 1


def test_what_the_core_raises_is_raised(sync):
    with pytest.raises(NotFound, match="does not exist"):
        sync.cancel(uuid.uuid4(), uuid.uuid4(), by=_somebody())


def _somebody():
    from plm_engine_core.control_plane import Principal

    return Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset())


async def test_it_refuses_to_block_a_running_loop(sync):
    with pytest.raises(RuntimeError, match="would block the event loop"):
        sync.verify_events(uuid.uuid4())
    assert await asyncio.to_thread(sync.verify_events, uuid.uuid4()) == []


def test_what_it_opens_is_opened_once_on_its_own_loop_and_closed_there(make_policy, registry):
    seen = []

    @asynccontextmanager
    async def opened():
        seen.append(asyncio.get_running_loop())
        yield ControlPlane(policy=make_policy(), registry=registry, storage=MemoryStorage())
        seen.append(asyncio.get_running_loop())

    with SyncControlPlane(opened()) as plane, ThreadPoolExecutor(4) as threads:
        assert list(threads.map(plane.verify_events, [uuid.uuid4()] * 8)) == [[]] * 8
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert seen[0].is_closed()


def test_one_that_could_not_be_opened_says_why_as_often_as_it_is_asked():
    @asynccontextmanager
    async def opened():
        raise StorageUnavailable("no database yet")
        yield

    with SyncControlPlane(opened()) as plane:
        with pytest.raises(StorageUnavailable, match="no database yet"):
            plane.verify_events(uuid.uuid4())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="could not be opened; make a new one: no database yet"):
                plane.verify_events(uuid.uuid4())


def test_what_would_end_an_event_loop_while_it_opens_is_told_and_it_can_be_closed():
    @asynccontextmanager
    async def opened():
        raise SystemExit("PG_DSN is not set")
        yield

    with SyncControlPlane(opened()) as plane:
        with pytest.raises(RuntimeError, match=r"was left with SystemExit\('PG_DSN is not set'") as told:
            plane.verify_events(uuid.uuid4())
        assert isinstance(told.value.__cause__, SystemExit)
        with pytest.raises(RuntimeError, match=r"could not be opened; make a new one: .*PG_DSN is not set"):
            plane.verify_events(uuid.uuid4())


def test_who_is_interrupted_while_it_opens_leaves_it_to_the_next(make_policy, registry):
    main, going_on = threading.get_ident(), threading.Event()

    @asynccontextmanager
    async def opened():
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.to_thread(going_on.wait, WAIT)
        yield ControlPlane(policy=make_policy(), registry=registry, storage=MemoryStorage())

    with SyncControlPlane(opened()) as plane:
        with pytest.raises(KeyboardInterrupt):
            plane.verify_events(uuid.uuid4())
        going_on.set()
        assert plane.verify_events(uuid.uuid4()) == []


def test_closing_while_it_opens_ends_that_too():
    opening, ended = threading.Event(), threading.Event()

    @asynccontextmanager
    async def opened():
        opening.set()
        try:
            yield await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    plane = SyncControlPlane(opened())
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(plane.verify_events, uuid.uuid4())
        assert opening.wait(WAIT)
        plane.close()
        with pytest.raises(RuntimeError, match="was closed while this call was under way"):
            waiting.result(WAIT)
    assert ended.is_set()


def test_closing_takes_back_what_is_under_way_and_refuses_what_comes_after(sync):
    started, cancelled = threading.Event(), threading.Event()

    async def endless(core):
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(sync.call, endless)
        assert started.wait(WAIT)
        sync.close()
        with pytest.raises(RuntimeError, match="was closed while this call was under way"):
            waiting.result(WAIT)
    assert cancelled.is_set()
    sync.close()
    with pytest.raises(RuntimeError, match="is closed; make a new one"):
        sync.verify_events(uuid.uuid4())


def test_who_is_interrupted_takes_the_call_back_and_may_go_on(sync):
    cancelled = threading.Event()
    main = threading.get_ident()

    async def interrupting(core):
        signal.pthread_kill(main, signal.SIGINT)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        sync.call(interrupting)
    assert cancelled.wait(WAIT)
    assert sync.verify_events(uuid.uuid4()) == []


def test_what_would_end_an_event_loop_is_told_and_ends_nothing(sync):
    async def leaving(core):
        raise SystemExit(3)

    for _ in range(2):
        with pytest.raises(SystemExit):
            sync.call(leaving)
    assert sync.verify_events(uuid.uuid4()) == []


def test_an_interrupt_between_handing_over_and_waiting_takes_the_call_back_too():
    cancelled = threading.Event()

    class Interrupted(LoopThread):
        def submit(self, work):
            super().submit(work)
            assert begun.wait(WAIT)
            raise KeyboardInterrupt

    async def endless():
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    begun = threading.Event()
    thread = Interrupted("a thread")
    with pytest.raises(KeyboardInterrupt):
        thread.run(endless)
    assert cancelled.wait(WAIT)
    thread.close()


FORKED = """
import os, sys, uuid, warnings
warnings.simplefilter("ignore")
from plm_engine_core import Governor
plane = Governor.in_memory({}).plane
assert plane.verify_events(uuid.uuid4()) == []
child = os.fork()
if child == 0:
    try:
        plane.verify_events(uuid.uuid4())
    except RuntimeError as error:
        plane.close()
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(2)
_, status = os.waitpid(child, 0)
assert plane.verify_events(uuid.uuid4()) == []
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_is_refused_and_the_original_goes_on():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_opened_something_and_is_forgotten_says_so(make_policy, registry):
    @asynccontextmanager
    async def opened():
        yield ControlPlane(policy=make_policy(), registry=registry, storage=MemoryStorage())

    plane = SyncControlPlane(opened())
    plane.verify_events(uuid.uuid4())
    thread = plane.thread
    with pytest.warns(ResourceWarning, match="unclosed"):
        del plane
    assert thread.abandon() is False
