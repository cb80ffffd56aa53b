"""Governed functions: what is refused does not run, and what runs is recorded as no better than it is."""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
import threading
import time
import uuid
from decimal import Decimal

import pytest
from plm_engine_core import (
    CallDenied,
    CallPending,
    CallRefused,
    CallSteered,
    CallStopped,
    Governor,
    OutcomeUnknown,
    OutputWithheld,
    SyncControlPlane,
    current_call,
    governed,
)
from plm_engine_core.agent_runtime import hold
from plm_engine_core.agent_runtime.governed_calls import GovernedCalls
from plm_engine_core.control_plane import ControlPlane, Principal
from plm_engine_core.control_plane.errors import InputRefused, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.policy.starter import policy_of
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CostBound
from plm_engine_core.control_plane.registry.written import registry_of
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import (
    CapabilityMode,
    Evidence,
    HaltScope,
    Reason,
    RunKind,
    RunState,
    StepState,
    TicketDecision,
)
from plm_engine_core.testing.clock import FakeClock
from plm_shared.testing.databases import create_tenants

BOSS = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.hitl.resolve", "plm.halt"}))
CAPABILITIES = {
    "shop.look": "read",
    "shop.order": "execute-write",
    "shop.pay": CapabilityDescriptor(
        id="shop.pay",
        description="pay a bill",
        mode=CapabilityMode.READ,
        plugin="python",
        cost=CostBound(max_eur=Decimal("0.40")),
    ),
}


@pytest.fixture(params=["memory", "postgres"])
def governor(request):
    """A governor over each storage."""
    if request.param == "memory":
        with Governor.in_memory(CAPABILITIES) as governor:
            yield governor
        return
    database = request.getfixturevalue("engine_database")
    (tenant,) = create_tenants(database, "acme")
    agent = Principal(user_id=uuid.uuid4(), actor_kind="agent", scopes=frozenset({"plm.runs.create"}))
    with SyncControlPlane(_opened(database)) as plane:
        yield Governor(plane, tenant_id=tenant, principal=agent)


def _opened(database):
    from contextlib import asynccontextmanager

    class NoDelivery:
        async def enqueue(self, connection, tenant_id, run_id, *, after_seconds=0.0):
            raise AssertionError("a run of kind external is not delivered before its ticket is decided")

    @asynccontextmanager
    async def opened():
        async with open_pool(database.app, max_size=4) as pool:
            yield ControlPlane(
                policy=policy_of(None), registry=registry_of(CAPABILITIES), storage=PostgresStorage(pool, NoDelivery())
            )

    return opened()


@pytest.fixture
def memory():
    with Governor.in_memory(
        CAPABILITIES | {"shop.steal": "read"}, policy={"tiers": {"shop.steal": "blocked"}}
    ) as governor:
        yield governor


def runs(governor):
    listed = governor.plane.call(
        lambda core: core.storage.runs.list(governor.tenant_id, limit=99, before=None, state=None)
    )
    return list(listed)


def only_step(governor, run):
    (step,) = governor.plane.call(lambda core: core.storage.runs.steps(governor.tenant_id, run.id))
    return step


async def the_storage(core):
    return core.storage


def approve(governor, pending, decision=TicketDecision.APPROVE):
    governor.plane.decide(governor.tenant_id, pending.ticket_id, decision, approver=BOSS, comment="so be it")


def test_a_call_that_is_allowed_runs_and_is_recorded_as_reported(governor):
    @governed("shop.look", by=governor, resource="shelf/{item}")
    def look(item, amount=1):
        return {"item": item, "left": amount}

    assert look("bolt") == {"item": "bolt", "left": 1}
    (run,) = runs(governor)
    assert (run.kind, run.state, run.principal) == (RunKind.EXTERNAL, RunState.SUCCEEDED, governor.principal)
    assert run.subjects.run_group_id == governor.run_group_id
    step = only_step(governor, run)
    assert (step.state, step.evidence, step.resource) == (StepState.SUCCEEDED, Evidence.REPORTED, "shelf/bolt")
    assert (step.arguments, step.output) == ({"item": "bolt", "amount": 1}, {"item": "bolt", "left": 1})
    kinds = [
        event.kind
        for event in governor.plane.call(lambda core: core.storage.events.read(governor.tenant_id, f"run/{run.id}"))
    ]
    assert kinds == ["run_created", "run_taken", "step_granted", "step_started", "step_settled", "run_succeeded"]
    assert all(each.consistent for each in governor.plane.verify_events(governor.tenant_id))


async def test_an_asynchronous_function_is_governed_the_same_way(memory):
    @governed("shop.look", by=memory)
    async def look(item):
        await asyncio.sleep(0)
        return item

    assert await asyncio.gather(*(look(f"n{number}") for number in range(5))) == [f"n{number}" for number in range(5)]
    states = [run.state for run in await asyncio.to_thread(runs, memory)]
    assert states == [RunState.SUCCEEDED] * 5


def test_what_is_refused_does_not_run_and_says_why(memory):
    ran = []
    strict = Governor.in_memory(CAPABILITIES, policy={"tiers": {"shop.look": "blocked"}})

    @governed("shop.look", by=strict)
    def look():
        ran.append(1)

    with strict, pytest.raises(CallDenied) as caught:
        look()
    assert caught.value.reason is Reason.CAPABILITY_BLOCKED
    assert ran == []


def test_a_call_under_a_halt_is_refused_and_does_not_come_back_when_it_is_lifted(governor):
    @governed("shop.look", by=governor)
    def look():
        raise AssertionError("it ran")

    halt = governor.plane.halt(governor.tenant_id, HaltScope.TENANT, None, reason="smoke", by=BOSS)
    with pytest.raises(CallDenied, match="a tenant halt stands: smoke") as caught:
        look()
    assert (caught.value.reason, caught.value.unblock) == (Reason.HALTED, f"lifting the halt {halt.id}")
    governor.plane.lift(governor.tenant_id, halt.id, by=BOSS)
    (run,) = runs(governor)
    assert (run.id, run.state) == (caught.value.run_id, RunState.CANCELLED)


def test_a_refused_call_ends_its_run_with_the_reason(memory):
    @governed("shop.steal", by=memory)
    def steal():
        raise AssertionError("it ran")

    with pytest.raises(CallDenied, match=r"the policy blocks shop\.steal"):
        steal()
    (run,) = runs(memory)
    assert (run.state, run.reason) == (RunState.FAILED, "capability_blocked")


def test_a_budget_that_is_too_small_is_named():
    limits = {"run": {"EUR": "0.1", "calls": "1"}, "tenant": {"EUR": "9", "calls": "9"}}
    with Governor.in_memory(CAPABILITIES, policy={"budgets": limits}) as governor:

        @governed("shop.pay", by=governor)
        def pay():
            raise AssertionError("it ran")

        with pytest.raises(CallDenied) as caught:
            pay()
    assert caught.value.reason is Reason.BUDGET_EXCEEDED
    assert (caught.value.limit["limit"], caught.value.limit["needed"]) == ("0.1", "0.4")


def test_a_call_that_waits_says_whose_approval_it_needs_as_often_as_it_is_asked():
    policy = {"approval": {"by_risk": {"high": {"required_scope": "shop.boss", "quorum": 2}}}}
    with Governor.in_memory(CAPABILITIES, policy=policy) as governor:

        @governed("shop.order", by=governor)
        def order():
            raise AssertionError("it ran")

        with pytest.raises(CallPending, match=r"approval by 2 people with .*shop\.boss") as caught:
            order()
        with pytest.raises(CallPending) as still:
            caught.value.resume()
        assert still.value.unblock == caught.value.unblock


def test_a_steered_call_says_what_to_call_instead():
    policy = {"tiers": {"shop.look": "steer"}, "guidance": {"shop.look": "ask the clerk"}}
    with Governor.in_memory(CAPABILITIES, policy=policy) as governor:

        @governed("shop.look", by=governor)
        def look():
            raise AssertionError("it ran")

        with pytest.raises(CallSteered) as caught:
            look()
    assert caught.value.guidance == "ask the clerk"
    assert isinstance(caught.value, CallRefused)


def endless(governor):
    """A governed function that never ends of itself, and what tells that it has begun."""
    begun = asyncio.Event()

    @governed("shop.look", by=governor)
    async def look():
        begun.set()
        await asyncio.get_running_loop().create_future()

    return look, begun


class TestApproval:
    """A call that waits for a human."""

    def test_a_halt_after_the_approval_only_puts_it_off(self, memory):
        @governed("shop.order", by=memory)
        def order():
            return "done"

        with pytest.raises(CallPending) as caught:
            order()
        approve(memory, caught.value)
        halt = memory.plane.halt(memory.tenant_id, HaltScope.TENANT, None, reason="smoke", by=BOSS)
        with pytest.raises(CallDenied, match="smoke"):
            caught.value.resume()
        memory.plane.lift(memory.tenant_id, halt.id, by=BOSS)
        assert caught.value.resume() == "done"

    def test_it_is_made_once_after_the_approval_with_the_arguments_that_were_approved(self, memory):
        made = []

        @governed("shop.order", by=memory)
        def order(item):
            made.append(item)
            return len(made)

        with pytest.raises(CallPending, match=r"approval by a person .*, of ticket") as caught:
            order("bolt")
        pending = caught.value
        with pytest.raises(CallPending) as still:
            pending.resume()
        assert (still.value.ticket_id, made) == (pending.ticket_id, [])
        approve(memory, pending)
        assert (pending.resume(), made) == (1, ["bolt"])
        with pytest.raises(CallDenied, match="succeeded, so its call cannot be made"):
            pending.resume()
        assert made == ["bolt"]

    def test_a_denial_is_told_in_the_approvers_words(self, memory):
        @governed("shop.order", by=memory)
        def order():
            raise AssertionError("it ran")

        with pytest.raises(CallPending) as caught:
            order()
        approve(memory, caught.value, TicketDecision.DENY)
        with pytest.raises(CallDenied, match="so be it") as denied:
            caught.value.resume()
        assert denied.value.reason is Reason.APPROVAL_DENIED

    async def test_an_asynchronous_call_is_resumed_by_awaiting(self, memory):
        @governed("shop.order", by=memory)
        async def order(item):
            return item

        with pytest.raises(CallPending) as caught:
            await order("nut")
        await asyncio.to_thread(approve, memory, caught.value)
        assert await caught.value.resume() == "nut"

    def test_the_caller_cannot_approve_its_own_call(self, memory):
        @governed("shop.order", by=memory)
        def order():
            raise AssertionError("it ran")

        with pytest.raises(CallPending) as caught:
            order()
        with pytest.raises(Exception, match="only a human"):
            memory.plane.decide(
                memory.tenant_id, caught.value.ticket_id, TicketDecision.APPROVE, approver=memory.principal
            )


class TestLostReplies:
    """The admission of a governed call uses its grant up; the call is made once, or not at all."""

    @pytest.fixture
    def storage(self, governor):
        return governor.plane.call(the_storage)

    def test_a_call_is_two_bookings(self, governor, storage, monkeypatch):
        booked = [self.counted(monkeypatch, storage, name) for name in ("admit", "begin", "settle")]
        governed("shop.look", by=governor)(lambda: 0)()
        assert [len(each) for each in booked] == [1, 0, 1]

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_call_that_began_unheard_of_is_still_made_once(self, governor, storage, monkeypatch, times):
        asked = self.counted(monkeypatch, storage, "admit", "admit_as_assumed", lost=times)
        made = []
        governed("shop.look", by=governor)(lambda: made.append(0))()
        assert (len(made), len(asked)) == (1, times + 1)
        (run,) = runs(governor)
        assert (run.state, only_step(governor, run).state) == (RunState.SUCCEEDED, StepState.SUCCEEDED)

    def test_a_call_of_which_nothing_is_heard_is_not_made_and_recovery_closes_it(self, governor, storage, monkeypatch):
        self.counted(monkeypatch, storage, "admit", "admit_as_assumed", lost=99)
        made = []
        with pytest.raises(CallDenied) as caught:
            governed("shop.look", by=governor)(lambda: made.append(0))()
        assert (made, caught.value.reason) == ([], Reason.STORAGE_BUSY)
        (run,) = runs(governor)
        assert (run.state, only_step(governor, run).state) == (RunState.RUNNING, StepState.RUNNING)

        async def swept(core):
            await core.storage.runs.renew(run.tenant_id, run.id, fencing_token=1, seconds=1e-6)
            await Recovery(core.storage).sweep()

        governor.plane.call(swept)
        (run,) = runs(governor)
        assert (run.state, only_step(governor, run).state) == (RunState.OUTCOME_UNKNOWN, StepState.OUTCOME_UNKNOWN)

    def test_a_call_that_could_not_be_booked_ends_its_run(self, governor, storage, monkeypatch):
        async def busy(*_, **__):
            raise StorageUnavailable("busy")

        for name in ("admit", "admit_as_assumed"):
            monkeypatch.setattr(storage.admission, name, busy)
        with pytest.raises(CallDenied, match="busy"):
            governed("shop.look", by=governor)(lambda: 0)()
        (run,) = runs(governor)
        assert (run.state, run.reason) == (RunState.FAILED, "storage_busy")

    def test_a_run_that_is_cancelled_before_its_call_makes_none(self, memory, monkeypatch):
        storage = memory.plane.call(the_storage)
        take = storage.runs.take

        async def cancelled_meanwhile(tenant_id, run_id, **keywords):
            lease = await take(tenant_id, run_id, **keywords)
            await storage.runs.request_cancel(tenant_id, run_id, actor="human:x")
            return lease

        monkeypatch.setattr(storage.runs, "take", cancelled_meanwhile)
        with pytest.raises(CallDenied, match="being cancelled") as caught:
            governed("shop.look", by=memory)(lambda: 0)()
        assert caught.value.reason is Reason.CANCEL_REQUESTED
        (run,) = runs(memory)
        assert run.state is RunState.FAILED

    def test_a_process_that_stood_still_after_its_admission_makes_no_call(self, governor, storage, monkeypatch):
        moment, admit = hold.moment, storage.admission.admit

        async def stopped(*args, **keywords):
            answer = await admit(*args, **keywords)
            monkeypatch.setattr(hold, "moment", lambda: moment() + 100.0)
            return answer

        monkeypatch.setattr(storage.admission, "admit", stopped)
        monkeypatch.setattr(hold, "beat_of", lambda *_: 600.0)  # it does not hear of it before
        made = []
        with pytest.raises(CallDenied) as caught:
            governed("shop.look", by=governor)(lambda: made.append(0))()
        assert (made, caught.value.reason) == ([], Reason.LEASE_EXPIRED)
        (run,) = runs(governor)
        assert (run.state, only_step(governor, run).state) == (RunState.FAILED, StepState.NOT_STARTED)

    def test_the_lease_is_kept_while_an_answer_is_waited_for(self, governor, storage, monkeypatch):
        renew, admit, renewed = storage.runs.renew, storage.admission.admit, asyncio.Event()

        async def renewing(*args, **keywords):
            beat = await renew(*args, **keywords)
            renewed.set()
            return beat

        async def slow(*args, **keywords):
            await asyncio.wait_for(renewed.wait(), 60)
            return await admit(*args, **keywords)

        monkeypatch.setattr(hold, "beat_of", lambda *_: 0.01)
        monkeypatch.setattr(storage.runs, "renew", renewing)
        monkeypatch.setattr(storage.admission, "admit", slow)
        assert governed("shop.look", by=governor)(lambda: 7)() == 7

    def counted(self, monkeypatch, storage, *names, lost=0):
        """The bookings of these names, of which the replies to the first `lost` get lost."""
        booked = []

        def counting(original):
            async def counted(*args, **keywords):
                booked.append(await original(*args, **keywords))
                if len(booked) <= lost:
                    raise StorageUnavailable("the reply was lost")
                return booked[-1]

            return counted

        for name in names:
            monkeypatch.setattr(storage.admission, name, counting(getattr(storage.admission, name)))
        return booked


class TestOutcomes:
    """What becomes of a call is recorded as it was."""

    def test_an_error_is_recorded_and_raised(self, memory):
        @governed("shop.look", by=memory)
        def look():
            raise ValueError("no such shelf \x00")

        with pytest.raises(ValueError, match="no such shelf"):
            look()
        (run,) = runs(memory)
        step = only_step(memory, run)
        assert (run.state, step.state) == (RunState.FAILED, StepState.FAILED)
        assert step.error == {"category": "ValueError", "message": "no such shelf \\0"}

    @pytest.mark.parametrize("error", [OutcomeUnknown("the line went dead"), KeyboardInterrupt(), SystemExit(1)])
    def test_who_cannot_know_or_is_interrupted_leaves_the_outcome_unknown(self, memory, error):
        @governed("shop.look", by=memory)
        def look():
            raise error

        with pytest.raises(type(error)):
            look()
        (run,) = runs(memory)
        assert run.state is RunState.OUTCOME_UNKNOWN

    async def test_one_of_several_errors_that_leaves_it_open_is_enough(self, memory):
        async def lost():
            raise OutcomeUnknown("the line went dead")

        @governed("shop.look", by=memory)
        async def look():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(lost())

        with pytest.raises(ExceptionGroup):
            await look()
        (run,) = await asyncio.to_thread(runs, memory)
        assert run.state is RunState.OUTCOME_UNKNOWN

    def test_an_error_that_cannot_be_shown_is_recorded_all_the_same(self, memory):
        class Shy(Exception):
            def __str__(self):
                raise RuntimeError("no words")

        @governed("shop.look", by=memory)
        def look():
            raise Shy

        with pytest.raises(Shy):
            look()
        (run,) = runs(memory)
        assert only_step(memory, run).error == {"category": "Shy", "message": "it cannot be shown (RuntimeError)"}

    def test_a_result_that_cannot_be_read_is_returned_and_not_recorded(self, memory):
        class Shy(list):
            def __iter__(self):
                raise RuntimeError("not now")

        thing = Shy([1])
        assert governed("shop.look", by=memory)(lambda: thing)() is thing
        (run,) = runs(memory)
        assert (run.state, only_step(memory, run).output) == (RunState.SUCCEEDED, None)

    async def test_a_result_is_recorded_as_it_was_returned_whatever_others_make_of_it(self, memory, monkeypatch):
        storage = await asyncio.to_thread(memory.plane.call, the_storage)
        settle, shared = storage.admission.settle, {"first": 1}

        async def late(*args, **keywords):
            shared["second"] = object()
            return await settle(*args, **keywords)

        monkeypatch.setattr(storage.admission, "settle", late)

        @governed("shop.look", by=memory)
        async def look():
            return shared

        assert await look() is shared
        (run,) = await asyncio.to_thread(runs, memory)
        step = await asyncio.to_thread(only_step, memory, run)
        assert (run.state, step.output) == (RunState.SUCCEEDED, {"first": 1})

    @pytest.mark.parametrize("told", [False, True])
    async def test_who_is_cancelled_before_the_call_is_made_leaves_nothing_open(self, memory, monkeypatch, told):
        """Whether the cancel comes while it is decided, or when the answer is on its way."""
        open_call, asked, go_on, opened = GovernedCalls.open_call, asyncio.Event(), threading.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        async def slow(*args):
            loop.call_soon_threadsafe(asked.set)
            await asyncio.to_thread(go_on.wait, 60)
            answer = await open_call(*args)
            opened.set()
            return answer

        monkeypatch.setattr(GovernedCalls, "open_call", slow)

        @governed("shop.pay", by=memory)
        async def pay():
            raise AssertionError("it ran")

        task = asyncio.create_task(pay())
        await asked.wait()
        if told:
            go_on.set()
            assert opened.wait(60)  # this loop stands still, so the answer waits for it
            memory.plane.thread.submit(lambda: memory.plane.on_core(the_storage)).result(60)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        states = []
        async with asyncio.timeout(60):
            while states != [RunState.FAILED]:
                await asyncio.sleep(0)
                states = [run.state for run in await asyncio.to_thread(runs, memory)]
        (run,) = await asyncio.to_thread(runs, memory)
        assert (await asyncio.to_thread(only_step, memory, run)).state is StepState.NOT_STARTED

    def test_who_is_interrupted_before_the_call_is_made_leaves_nothing_open(self, memory, monkeypatch):
        open_call, main = GovernedCalls.open_call, threading.get_ident()

        async def slow(*args):
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.to_thread(interrupted.wait, 60)
            return await open_call(*args)

        monkeypatch.setattr(GovernedCalls, "open_call", slow)
        interrupted = threading.Event()
        with pytest.raises(KeyboardInterrupt):
            governed("shop.pay", by=memory)(lambda: pytest.fail("it ran"))()
        interrupted.set()
        give_up, states = time.monotonic() + 60, []
        while states != [RunState.FAILED] and time.monotonic() < give_up:
            states = [run.state for run in runs(memory)]
        (run,) = runs(memory)
        assert only_step(memory, run).state is StepState.NOT_STARTED

    def test_who_is_interrupted_while_an_outcome_is_recorded_finds_it_recorded(self, memory, monkeypatch):
        close_call, main = GovernedCalls.close_call, threading.get_ident()

        async def slow(*args, **keywords):
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.to_thread(interrupted.wait, 60)
            await close_call(*args, **keywords)

        monkeypatch.setattr(GovernedCalls, "close_call", slow)
        interrupted = threading.Event()
        with pytest.raises(KeyboardInterrupt):
            governed("shop.pay", by=memory)(lambda: 7)()
        interrupted.set()
        give_up, states = time.monotonic() + 60, []
        while states != [RunState.SUCCEEDED] and time.monotonic() < give_up:
            states = [run.state for run in runs(memory)]
        assert states == [RunState.SUCCEEDED]

    async def test_a_cancelled_call_is_unknown_too(self, memory):
        look, begun = endless(memory)
        task = asyncio.create_task(look())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (run,) = await asyncio.to_thread(runs, memory)
        assert run.state is RunState.OUTCOME_UNKNOWN

    def test_a_result_that_is_no_json_is_returned_and_not_recorded(self, memory):
        thing = object()

        @governed("shop.look", by=memory)
        def look():
            return thing

        assert look() is thing
        (run,) = runs(memory)
        assert only_step(memory, run).output is None

    def test_what_nobody_measured_costs_all_that_was_reserved(self, memory):
        @governed("shop.pay", by=memory)
        def pay():
            return None

        pay()
        (run,) = runs(memory)
        budgets = memory.plane.call(lambda core: core.storage.runs.budgets(memory.tenant_id, run.id))
        spent = {(each.scope.value, str(each.unit)): each.spent for each in budgets}
        assert spent["tenant", "EUR"] == Decimal("0.40")
        assert spent["run", "calls"] == 1


@pytest.fixture
def brief():
    """A governor that hears of a halt within a tenth of a second, and whose leases do not run out meanwhile."""
    with Governor.in_memory(CAPABILITIES, storage=MemoryStorage(clock=FakeClock())) as patient:
        yield Governor(patient.plane, tenant_id=patient.tenant_id, principal=patient.principal, lease_seconds=0.3)


@pytest.fixture
def hasty():
    """A governor with long leases, whose control plane promises that calls end three seconds after a halt."""
    storage = MemoryStorage()
    tenant = storage.add_tenant(uuid.uuid4())
    core = ControlPlane(policy=policy_of(None), registry=registry_of(CAPABILITIES), storage=storage, cancel_seconds=3)
    agent = Principal(user_id=uuid.uuid4(), actor_kind="agent", scopes=frozenset({"plm.runs.create"}))
    with SyncControlPlane(core) as plane:
        yield Governor(plane, tenant_id=tenant, principal=agent, lease_seconds=600)


def smoke(governor):
    return governor.plane.halt(governor.tenant_id, HaltScope.TENANT, None, reason="smoke", by=BOSS)


SECRET = "AKIAEXAMPLE0000000000"  # nobody's
NO_KEYS = {"kind": "regex", "config": {"patterns": ["AKIA[A-Z0-9]{16}"]}}


@pytest.fixture
def watched():
    """A governor under whose policy no keys leave a function."""
    gate = {"name": "no-keys", "phase": "output", "capabilities": ["shop.look"], **NO_KEYS}
    with Governor.in_memory(CAPABILITIES, policy={"evaluators": [gate]}) as governor:
        yield governor


def told_of(error):
    """Whatever an error hands on: its texts, those before it, and what its frames in this package still hold."""
    told = []
    while error is not None:
        told += [str(error), repr(vars(error))]
        trace = error.__traceback__
        while trace is not None:
            if "plm_engine_core" in trace.tb_frame.f_code.co_filename:
                told += map(repr, trace.tb_frame.f_locals.values())
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return "".join(told)


class TestWithheldOutputs:
    """What an evaluator does not let be kept, the caller is not given either; the function did run."""

    def check(self, governor, error, status):
        (run,) = runs(governor)
        step = only_step(governor, run)
        assert (step.state.value, step.output, step.error["reason"]) == (status, None, "evaluator_denied")
        assert (error.run_id, error.evaluator, error.reason) == (run.id, "no-keys", Reason.EVALUATOR_DENIED)
        assert (error.status.value, error.digest) == (status, step.error["withheld"]["digest"])
        assert SECRET not in f"{run} {step}"
        assert SECRET not in told_of(error)
        assert step.usage == {}
        return run

    @pytest.mark.parametrize("result", [SECRET, {"a": [SECRET]}], ids=["text", "within"])
    def test_a_result_is_not_returned(self, watched, result):
        calls = []

        @governed("shop.look", by=watched)
        def look():
            calls.append(1)
            return result

        with pytest.raises(OutputWithheld, match="do not make it again") as withheld:
            look()
        run = self.check(watched, withheld.value, "succeeded")
        assert (calls, run.state) == ([1], RunState.SUCCEEDED)

    async def test_neither_is_that_of_an_asynchronous_function(self, watched):
        @governed("shop.look", by=watched)
        async def look():
            return SECRET

        with pytest.raises(OutputWithheld) as withheld:
            await look()
        await asyncio.to_thread(self.check, watched, withheld.value, "succeeded")

    def test_an_error_is_not_raised(self, watched):
        @governed("shop.look", by=watched)
        def look():
            raise ValueError(f"cannot log in with {SECRET}")

        with pytest.raises(OutputWithheld) as withheld:
            look()
        run = self.check(watched, withheld.value, "failed")
        assert (run.state, run.reason) == (RunState.FAILED, "failed")

    async def test_neither_is_that_of_an_asynchronous_function_that_leaves_it_open(self, watched):
        @governed("shop.look", by=watched)
        async def look():
            raise OutcomeUnknown(SECRET)

        with pytest.raises(OutputWithheld) as withheld:
            await look()
        run = await asyncio.to_thread(self.check, watched, withheld.value, "outcome_unknown")
        assert run.state is RunState.OUTCOME_UNKNOWN

    def test_who_is_interrupted_stays_so(self, watched):
        @governed("shop.look", by=watched)
        def look():
            raise KeyboardInterrupt(SECRET)

        with pytest.raises(KeyboardInterrupt):
            look()
        (run,) = runs(watched)
        assert SECRET not in f"{run} {only_step(watched, run)}"

    @pytest.mark.parametrize("result", [object(), {"a": {1, 2}}], ids=["object", "within"])
    def test_what_is_no_json_nobody_can_be_asked_about(self, watched, result):
        with pytest.raises(OutputWithheld, match="no JSON") as withheld:
            governed("shop.look", by=watched)(lambda: result)()
        assert (withheld.value.reason, withheld.value.digest) == (Reason.EVALUATOR_FAILED, "")
        assert governed("shop.pay", by=watched)(lambda: result)() is result

    def test_neither_about_an_error_of_which_only_the_beginning_is_recorded(self, watched):
        @governed("shop.look", by=watched)
        def look():
            raise ValueError("." * 3000 + SECRET)

        with pytest.raises(OutputWithheld) as withheld:
            look()
        assert SECRET not in told_of(withheld.value)

    def test_what_is_allowed_is_returned_and_raised_as_ever(self, watched):
        @governed("shop.look", by=watched)
        def look(word):
            if word == "none":
                raise LookupError(word)
            return word

        assert look("bolt") == "bolt"
        with pytest.raises(LookupError, match="none"):
            look("none")
        assert governed("shop.look", by=watched)(lambda: None)() is None

    def test_a_run_that_may_not_be_given_nothing_is_not_created_and_the_function_not_called(self):
        needs = {"kind": "json_schema", "config": {"schema": {"required": ["order"]}}}
        gate = {"name": "complete", "phase": "input", **needs}
        with Governor.in_memory(CAPABILITIES, policy={"evaluators": [gate]}) as strict:
            with pytest.raises(InputRefused) as refused:
                governed("shop.look", by=strict)(lambda: pytest.fail("it was called"))()
            assert (refused.value.evaluator, runs(strict)) == ("complete", [])


class TestStopping:
    """A call in progress hears of a halt or a cancel."""

    async def test_a_halt_cancels_an_asynchronous_function_in_its_middle(self, brief):
        begun, undone = asyncio.Event(), []

        @governed("shop.look", by=brief)
        async def look():
            begun.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                undone.append(1)

        task = asyncio.create_task(look())
        await begun.wait()
        halt = await asyncio.to_thread(smoke, brief)
        with pytest.raises(CallStopped, match="a tenant halt stands: smoke") as caught:
            async with asyncio.timeout(30):
                await task
        (run,) = await asyncio.to_thread(runs, brief)
        assert (run.id, run.state, undone) == (caught.value.run_id, RunState.OUTCOME_UNKNOWN, [1])
        told = await asyncio.to_thread(brief.plane.call, lambda core: core.storage.halts.get(brief.tenant_id, halt.id))
        assert (told.calls.in_flight, told.calls.open) == (1, 0), "its record says that the call has ended"

    async def test_it_ends_within_what_the_record_of_the_halt_promises_however_short_that_is(self, hasty):
        look, begun = endless(hasty)
        task = asyncio.create_task(look())
        await begun.wait()
        halt = await asyncio.to_thread(smoke, hasty)
        with pytest.raises(CallStopped):
            await task
        told = await asyncio.to_thread(hasty.plane.call, lambda core: core.storage.halts.get(hasty.tenant_id, halt.id))
        assert (told.cancel_seconds, told.calls.open) == (3, 0)
        assert (told.calls.last_ended_at - told.triggered_at).total_seconds() <= told.cancel_seconds

    async def test_a_cancel_of_its_run_does_so_too(self, brief):
        look, begun = endless(brief)
        task = asyncio.create_task(look())
        await begun.wait()
        (run,) = await asyncio.to_thread(runs, brief)
        await asyncio.to_thread(brief.plane.cancel, brief.tenant_id, run.id, by=brief.principal)
        with pytest.raises(CallStopped, match="its run was cancelled"):
            async with asyncio.timeout(30):
                await task

    async def test_the_task_around_a_stopped_call_goes_on(self, brief):
        look, begun = endless(brief)

        async def caller():
            with pytest.raises(CallStopped):
                await look()
            await asyncio.sleep(0)
            return asyncio.current_task().cancelling()

        task = asyncio.create_task(caller())
        await begun.wait()
        await asyncio.to_thread(smoke, brief)
        assert await task == 0

    async def test_a_function_that_will_not_be_stopped_is_recorded_as_it_ended(self, brief):
        begun = asyncio.Event()

        @governed("shop.look", by=brief)
        async def look():
            begun.set()
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                return "done all the same"

        async def caller():
            return await look(), asyncio.current_task().cancelling()

        task = asyncio.create_task(caller())
        await begun.wait()
        await asyncio.to_thread(smoke, brief)
        assert await task == ("done all the same", 0)
        (run,) = await asyncio.to_thread(runs, brief)
        assert run.state is RunState.SUCCEEDED

    async def test_a_cancel_of_the_callers_own_stays_one(self, brief):
        look, begun = endless(brief)
        task = asyncio.create_task(look())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def test_a_synchronous_function_asks(self, brief):
        @governed("shop.look", by=brief)
        def look():
            smoke(brief)
            give_up = time.monotonic() + 30
            while time.monotonic() < give_up:
                current_call().check()
                time.sleep(0.01)

        with pytest.raises(CallStopped, match="a tenant halt stands: smoke") as caught:
            look()
        (run,) = runs(brief)
        assert (run.id, run.state) == (caught.value.run_id, RunState.OUTCOME_UNKNOWN)

    def test_who_can_undo_what_was_done_says_so(self, brief):
        @governed("shop.look", by=brief)
        def look():
            call = current_call()
            smoke(brief)
            give_up = time.monotonic() + 30
            while not call.stopping and time.monotonic() < give_up:
                time.sleep(0.01)
            raise ValueError(f"taken back, as {call.stopping}")

        with pytest.raises(ValueError, match="taken back, as a tenant halt stands: smoke"):
            look()
        (run,) = runs(brief)
        assert run.state is RunState.FAILED

    def test_each_call_has_its_own_and_outside_there_is_none(self, brief):
        @governed("shop.look", by=brief)
        def inner():
            return str(current_call().run_id)

        @governed("shop.look", by=brief)
        def outer():
            mine = str(current_call().run_id)
            return [mine, inner(), str(current_call().run_id)]

        first, second, third = outer()
        assert first == third != second
        assert {str(run.id) for run in runs(brief)} == {first, second}
        with pytest.raises(LookupError, match="no governed function"):
            current_call()


class TestMisuse:
    """Defects of the caller are told early and by name."""

    def test_a_capability_that_is_not_registered(self, memory):
        with pytest.raises(InvalidRequest, match=r"shop\.burn is not registered"):
            governed("shop.burn", by=memory)

    def test_where_the_control_plane_would_wait_for_itself(self, memory):
        async def decorating(core):
            return governed("shop.look", by=memory)(lambda: 0)

        with pytest.raises(RuntimeError, match="would wait for itself"):
            memory.plane.call(decorating)

    def test_arguments_that_are_no_json_by_path_unless_left_out(self, memory):
        @governed("shop.look", by=memory)
        def look(client, item):
            raise AssertionError("it ran")

        with pytest.raises(InvalidRequest, match=r"arguments\.client"):
            look(object(), "bolt")
        assert [run.state for run in runs(memory)] == [RunState.FAILED]

        @governed("shop.look", by=memory, leave_out=("client",))
        def look_again(client, item):
            return item

        assert look_again(object(), "bolt") == "bolt"

    def test_wrong_arguments_are_the_functions_own_type_error_and_no_call(self, memory):
        @governed("shop.look", by=memory)
        def look(item):
            raise AssertionError("it ran")

        with pytest.raises(TypeError, match="item"):
            look()
        assert runs(memory) == []

    @pytest.mark.parametrize("resource", ["shelf/{shelf}", "shelf/{item:d}", "shelf/{item.name}", "shelf/{}"])
    def test_a_resource_that_cannot_be_filled_in(self, memory, resource):
        @governed("shop.look", by=memory, resource=resource)
        def look(item):
            raise AssertionError("it ran")

        with pytest.raises(InvalidRequest, match="cannot be filled in"):
            look(["bolt"])

    @pytest.mark.parametrize("leave_out", ["item", ("items",), ("item", "client")])
    def test_leaving_out_what_is_no_argument_by_name(self, memory, leave_out):
        with pytest.raises(InvalidRequest, match="leave_out has to name arguments of") as caught:
            governed("shop.look", by=memory, leave_out=leave_out)(lambda item: item)
        assert caught.value.field == "leave_out"

    def test_what_does_not_say_which_arguments_it_takes(self, memory):
        with pytest.raises(InvalidRequest, match="does not say which arguments it takes"):
            governed("shop.look", by=memory)(classmethod(lambda cls: cls))

    def test_annotations_may_name_what_is_defined_later(self, memory):
        """From Python 3.14 on they are read only when somebody asks for them; before that, where the module says so."""
        lazily = 0 if sys.version_info >= (3, 14) else annotations.compiler_flag
        namespace = {}
        text = "def look(number: Later) -> Later:\n    return number"
        exec(compile(text, "a module", "exec", flags=lazily, dont_inherit=True), namespace)  # noqa: S102  # as above
        assert governed("shop.look", by=memory)(namespace["look"])(5) == 5

    async def test_arguments_that_are_changed_while_they_are_decided_on_are_not_called_with(self, memory):
        @governed("shop.look", by=memory)
        async def look(items):
            raise AssertionError("it ran")

        items = [0]
        calling = asyncio.create_task(look(items))
        while not calling.done():
            items[0] += 1
            await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="were changed while it was decided"):
            await calling
        (run,) = await asyncio.to_thread(runs, memory)
        assert run.state is RunState.FAILED

    def test_what_cannot_be_copied_is_told_by_its_path(self, memory):
        with pytest.raises(InvalidRequest, match=r"arguments\.lock"):
            governed("shop.look", by=memory)(lambda lock: lock)(threading.Lock())

    def test_a_function_that_would_run_when_its_call_is_over_is_refused(self, memory):
        def pages(item):
            yield item

        async def pages_to_come(item):
            yield item

        for function in (pages, pages_to_come):
            with pytest.raises(InvalidRequest, match="after its call is over"):
                governed("shop.look", by=memory)(function)

    def test_one_that_returns_what_has_not_run_yet_has_failed_and_it_never_runs(self, memory):
        async def later():
            raise AssertionError("it ran")

        for what in (later, lambda: (pytest.fail("it ran") for _ in "1")):
            with pytest.raises(InvalidRequest, match="after its call is over"):
                governed("shop.look", by=memory, leave_out=("what",))(lambda what: what())(what)
        assert [only_step(memory, run).state for run in runs(memory)] == [StepState.FAILED] * 2

    def test_what_can_be_called_is_governed_whatever_it_is(self, memory):
        class Shelf:
            async def __call__(self, item):
                return item

        def look(shelf, item):
            return [shelf, item]

        assert governed("shop.look", by=memory)(functools.partial(look, "high"))("bolt") == ["high", "bolt"]
        assert asyncio.run(governed("shop.look", by=memory)(Shelf())("bolt")) == "bolt"

    async def test_a_synchronous_function_inside_a_loop(self, memory):
        @governed("shop.look", by=memory)
        def look():
            return threading.current_thread().name

        with pytest.raises(RuntimeError, match="would block the event loop"):
            look()
        assert await asyncio.to_thread(look)

    @pytest.mark.parametrize(
        ("capabilities", "policy", "words"),
        [
            ({"shop.look": "peek"}, None, r"'shop\.look' is refused: mode"),
            ({"Shop": "read"}, None, "'Shop' is refused: id"),
            ({}, {"budgets": 7}, "the policy is refused: budgets"),
            ({}, {"colour": "red"}, "the policy is refused: colour"),
        ],
    )
    def test_a_policy_or_capability_that_is_none(self, capabilities, policy, words):
        with pytest.raises(InvalidRequest, match=words):
            Governor.in_memory(capabilities, policy=policy)


def test_policy_and_capabilities_may_be_files(tmp_path):
    policy, capabilities = tmp_path / "policy.json", tmp_path / "capabilities.yaml"
    policy.write_text(policy_of(None).model_dump_json())
    capabilities.write_text("capabilities: [{id: a.b, description: x, mode: read, plugin: python}]")
    with Governor.in_memory(str(capabilities), policy=str(policy)) as governor:

        @governed("a.b", by=governor)
        def call():
            return 7

        assert call() == 7
