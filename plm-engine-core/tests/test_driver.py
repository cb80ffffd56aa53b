"""The driver over a scripted executor: plans run to their end, and no crash repeats or loses an effect."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal

import pytest
from plm_engine_core.agent_runtime import Driver, Finish, Plan, PlanAgent, Propose, Selector, hold
from plm_engine_core.agent_runtime.hold import Hold
from plm_engine_core.agent_runtime.retry import MAX_LOSSES, MAX_PROPOSALS, pause_seconds
from plm_engine_core.control_plane import ControlPlane, Outcome
from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.events import rebuild
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    OutcomeStatus,
    RunState,
    StepState,
    TicketDecision,
    TicketState,
)
from plm_engine_core.control_plane.why import why

READ, WRITE, FIRE = "thing.read", "thing.write", "thing.fire"

NAN = float("nan")

pytestmark = pytest.mark.every_storage


class ScriptedExecutor:
    """Answers each capability with the next entry of its script: an outcome, an exception, or something to await."""

    def __init__(self, **scripts):
        self.scripts = {name.replace("_", "."): list(entries) for name, entries in scripts.items()}
        self.calls = []
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    def offers(self, capability):
        return capability.id in (READ, WRITE, FIRE)

    async def cancel(self, grant):
        self.cancelled.set()

    async def execute(self, call, grant, progress):
        script = self.scripts.get(call.capability.id, [])
        entry = script.pop(0) if script else Outcome(status=OutcomeStatus.SUCCEEDED, output=dict(call.arguments))
        if entry == "hang before begin":
            await self._hang()
        begun = await call.begin()
        if not begun.accepted:
            return Outcome(
                status=OutcomeStatus.NOT_STARTED, error={"category": begun.reason.value, "message": begun.message}
            )
        self.calls.append((call.step_key, call.capability.id, dict(call.arguments)))
        await progress(0.5, "half")
        if entry == "hang":
            await self._hang()
        if entry == "until cancelled":
            self.entered.set()
            await self.cancelled.wait()
            self.cancelled.clear()
            return Outcome(status=OutcomeStatus.CANCELLED, error={"category": "cancelled", "message": "stopped"})
        if isinstance(entry, Exception):
            raise entry
        return entry if isinstance(entry, Outcome) else await entry()

    async def _hang(self):
        self.entered.set()
        await asyncio.get_running_loop().create_future()


def plan(*steps, **rest) -> Plan:
    return Plan.model_validate(
        {
            "agent": "test",
            "version": "1",
            "steps": [
                {"id": f"s{n}", "capability": step} if isinstance(step, str) else {"id": f"s{n}", **step}
                for n, step in enumerate(steps)
            ],
            **rest,
        }
    )


class Scene:
    """A run of one agent, an executor, and drivers to put to work on it."""

    def __init__(self, bench, executor):
        self.bench, self.executor, self.agent, self.run = bench, executor, None, None

    def driver(self, *, lease_seconds=60.0, owner="node/1"):
        return Driver(
            control_plane=self.bench.control_plane,
            agents=lambda _: self.agent,
            selector=Selector([self.executor]),
            owner=owner,
            lease_seconds=lease_seconds,
        )

    async def drive(self, **options):
        return await self.driver(**options).drive(self.bench.tenant, self.run.id)

    def start(self, **options):
        return asyncio.create_task(self.drive(**options))

    async def kill(self, task):
        """End a driver as a killed process ends: nothing more is written, and its lease runs out."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self.bench.let_lease_expire(self.run)

    async def steps(self):
        return [
            (each.step_id, each.attempt, each.state.value)
            for each in await self.bench.storage.runs.steps(self.bench.tenant, self.run.id)
        ]

    async def fresh(self):
        return await self.bench.storage.runs.get(self.bench.tenant, self.run.id)

    async def consistent(self):
        return all(each.consistent for each in await self.bench.control_plane.verify_events(self.bench.tenant))


@pytest.fixture
def scene(bench, monkeypatch):
    monkeypatch.setattr("plm_engine_core.agent_runtime.retry._jittered", lambda milliseconds: milliseconds // 100)

    async def make(agent, *, using=bench, run_input=None, **scripts):
        made = Scene(using, ScriptedExecutor(**scripts))
        made.agent = PlanAgent(agent) if isinstance(agent, Plan) else agent
        made.run = await using.run(input=run_input or {})
        return made

    return make


async def test_a_plan_runs_to_its_result_with_earlier_values_in_place(scene, bench):
    steps = (
        {"capability": READ, "arguments": {"name": {"ref": "inputs.name"}}},
        {"capability": READ, "arguments": {"seen": {"ref": "steps.s0.output.name"}}},
    )
    acts = await scene(
        plan(*steps, inputs={"name": {"type": "string"}}, result={"ref": "steps.s1.output"}), run_input={"name": "n"}
    )
    assert await acts.drive() is RunState.SUCCEEDED
    run = await acts.fresh()
    assert (run.result, run.reason, run.finished) == ({"seen": "n"}, None, True)
    assert [arguments for _, _, arguments in acts.executor.calls] == [{"name": "n"}, {"seen": "n"}]
    assert await bench.kinds(run) == [
        "run_created",
        "run_taken",
        *["step_granted", "step_started", "step_settled"] * 2,
        "run_succeeded",
    ]
    assert await bench.budget(run, "run", BudgetUnit.CALLS) == (2, 0)
    assert await acts.consistent()


async def test_a_failure_and_a_refusal_end_the_run_with_their_reason(scene, bench):
    failing = Outcome(status=OutcomeStatus.FAILED, error={"category": "user_input", "message": "no such file"})
    acts = await scene(plan(READ, READ), thing_read=[failing])
    assert await acts.drive() is RunState.FAILED
    run = await acts.fresh()
    assert (run.reason, run.message) == ("user_input", "step s0: no such file")
    blocked = await scene(plan(READ), using=bench.with_policy(tiers={READ: "blocked"}))
    assert await blocked.drive() is RunState.FAILED
    run = await blocked.fresh()
    assert (run.reason, run.message) == ("capability_blocked", "step s0: the policy blocks thing.read")
    assert blocked.executor.calls == []


SECRET = "AKIAEXAMPLE0000000000"  # nobody's
OUTPUT_GATE = {
    "name": "no-keys",
    "phase": "output",
    "kind": "regex",
    "config": {"patterns": ["AKIA[A-Z0-9]{16}"]},
}


class TestWithheldOutputs:
    """A step whose output was withheld has been made, once; only what needs the output cannot go on."""

    async def test_a_plan_goes_on_where_nothing_refers_to_it(self, scene, bench):
        gated = bench.with_policy(evaluators=[OUTPUT_GATE])
        kept = Outcome(status=OutcomeStatus.SUCCEEDED, output={"key": SECRET})
        acts = await scene(plan(READ, READ, result={"ref": "steps.s1.output"}), using=gated, thing_read=[kept])
        assert await acts.drive() is RunState.SUCCEEDED
        assert (len(acts.executor.calls), await acts.steps()) == (2, [("s0", 1, "succeeded"), ("s1", 1, "succeeded")])

    @pytest.mark.parametrize("what", ["a step", "the result"])
    async def test_what_refers_to_it_ends_the_run_and_nothing_is_made_again(self, scene, bench, what):
        gated = bench.with_policy(evaluators=[OUTPUT_GATE])
        kept = Outcome(status=OutcomeStatus.SUCCEEDED, output={"key": SECRET})
        needs = {"ref": "steps.s0.output"}
        second = [{"capability": READ, "arguments": {"all": [needs]}}] if what == "a step" else []
        result = {"key": {"ref": "steps.s0.output.key"}}
        acts = await scene(plan(READ, *second, result=result), using=gated, thing_read=[kept])
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert run.reason == "output_withheld"
        where = "step s1: 'steps.s0.output'" if second else "result: 'steps.s0.output.key'"
        assert run.message.startswith(
            f"{where} is not there: what thing.read gave back was withheld: evaluator no-keys"
        )
        assert len(acts.executor.calls) == 1
        assert await acts.consistent()

    async def test_an_agent_is_shown_who_withheld_it_and_never_what(self, scene, bench):
        class Curious:
            def __init__(self):
                self.seen = []

            def next(self, history):
                self.seen.append(history)
                if history.steps:
                    return Finish(succeeded=True, result=sorted(history.withheld()))
                return Propose(step_id="s0", capability=READ, resource="r", arguments={})

        gated = bench.with_policy(evaluators=[OUTPUT_GATE])
        curious, kept = Curious(), Outcome(status=OutcomeStatus.SUCCEEDED, output=[SECRET])
        acts = await scene(curious, using=gated, thing_read=[kept])
        assert await acts.drive() is RunState.SUCCEEDED
        last = curious.seen[-1]
        assert (last.outputs(), last.withheld()["s0"].evaluator) == ({}, "no-keys")
        assert SECRET not in f"{curious.seen}"

    async def test_a_failure_says_only_who_withheld_its_error(self, scene, bench):
        gated = bench.with_policy(evaluators=[OUTPUT_GATE])
        failing = Outcome(status=OutcomeStatus.FAILED, error={"category": "fatal", "message": SECRET})
        acts = await scene(plan(READ), using=gated, thing_read=[failing])
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert (run.reason, SECRET in run.message, len(acts.executor.calls)) == ("evaluator_denied", False, 1)

    async def test_a_step_whose_worker_was_lost_is_repeated_without_asking_anybody(self, scene, bench):
        strict = {**OUTPUT_GATE, "config": {"patterns": ["lost"]}}
        gated = bench.with_policy(evaluators=[strict])
        acts = await scene(plan(READ), using=gated, thing_read=["hang"])
        task = acts.start()
        await asyncio.wait_for(acts.executor.entered.wait(), 60)
        await acts.kill(task)
        assert await acts.drive() is RunState.SUCCEEDED
        first, second = await bench.storage.runs.steps(bench.tenant, acts.run.id)
        assert (first.state, first.error["category"]) == (StepState.SUPERSEDED, "abandoned")
        assert second.state is StepState.SUCCEEDED


async def test_doubled_and_late_calls_of_drive_are_harmless(scene):
    acts = await scene(plan(READ, READ, READ))
    ends = await asyncio.gather(*(acts.drive(owner=f"node/{n}") for n in range(6)))
    assert sorted(map(str, ends)) == ["None"] * 5 + ["succeeded"]
    assert await acts.drive() is None
    assert len(acts.executor.calls) == 3


async def pending(bench):
    """The tickets that wait for a decision."""
    return await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=TicketState.PENDING)


class TestApproval:
    """The run is parked as a row, and goes on with exactly what was shown."""

    async def test_an_approved_step_goes_on_as_the_same_attempt_with_the_recorded_arguments(self, scene, bench):
        class Forgetful:
            asked = 0

            def next(self, history):
                if history.outputs():
                    return Finish(succeeded=True)
                Forgetful.asked += 1
                return Propose(step_id="w", capability=WRITE, resource="r", arguments={"name": "n", "at": self.asked})

        acts = await scene(Forgetful())
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        assert await acts.drive() is None
        (ticket,) = await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=None)
        await bench.control_plane.decide(bench.tenant, ticket.id, TicketDecision.APPROVE, approver=bench.approver)
        assert await acts.drive() is RunState.SUCCEEDED
        assert acts.executor.calls == [(f"{acts.run.id}/0", WRITE, dict(ticket.arguments))]
        assert await acts.steps() == [("w", 1, "succeeded")]
        assert Forgetful.asked == 1

    async def test_a_denied_step_ends_the_run_with_the_approvers_words(self, scene, bench):
        acts = await scene(plan(WRITE))
        await acts.drive()
        (ticket,) = await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=None)
        await bench.control_plane.decide(
            bench.tenant, ticket.id, TicketDecision.DENY, approver=bench.approver, comment="no"
        )
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert (run.reason, run.message) == ("approval_denied", "step s0: denied by the approver: no")

    @pytest.mark.parametrize("change", ["policy", "definition"])
    async def test_what_was_approved_as_something_else_is_asked_for_anew_by_the_same_run(self, scene, bench, change):
        acts = await scene(plan(WRITE))
        await acts.drive()
        plane = bench.control_plane
        for time in range(4):  # as often as it takes: no agent did anything wrong
            registry, policy = plane.registry, bench.with_policy(version=f"{time}").control_plane.policy
            if change == "definition":
                policy = plane.policy
                registry = CapabilityRegistry(each.model_copy(update={"version": f"{time}"}) for each in registry)
            anew = ControlPlane(policy=policy, registry=registry, storage=plane.storage)
            acts.bench = replace(bench, control_plane=anew)
            (ticket,) = await pending(bench)
            await anew.decide(bench.tenant, ticket.id, TicketDecision.APPROVE, approver=bench.approver)
            assert await acts.drive() is RunState.AWAITING_APPROVAL
            assert acts.executor.calls == []
            (next_one,) = await pending(bench)
            assert (next_one.supersedes, next_one.arguments) == (ticket.id, ticket.arguments)
        await anew.decide(bench.tenant, next_one.id, TicketDecision.APPROVE, approver=bench.approver)
        assert await acts.drive() is RunState.SUCCEEDED
        assert [key for key, _, _ in acts.executor.calls] == [f"{acts.run.id}/0"]
        assert await acts.steps() == [*[("s0", attempt, "denied") for attempt in range(1, 5)], ("s0", 5, "succeeded")]

    async def test_a_denial_stands_under_another_policy(self, scene, bench):
        acts = await scene(plan(WRITE))
        await acts.drive()
        (ticket,) = await pending(bench)
        deny = {"approver": bench.approver, "comment": "no"}
        await bench.control_plane.decide(bench.tenant, ticket.id, TicketDecision.DENY, **deny)
        acts.bench = bench.with_policy(version="2")
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert (run.reason, run.message) == ("approval_denied", "step s0: denied by the approver: no")

    async def test_an_approval_survives_a_halt(self, scene, bench):
        acts = await scene(plan(WRITE))
        await acts.drive()
        (ticket,) = await bench.storage.approvals.list(bench.tenant, limit=9, after=None, state=None)
        await bench.control_plane.decide(bench.tenant, ticket.id, TicketDecision.APPROVE, approver=bench.approver)
        halt = await bench.halt(HaltScope.TENANT)
        assert (await acts.drive(), await bench.state(acts.run)) == (None, RunState.HALTED)
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "succeeded")]


class TestCrashes:
    """Whatever moment a driver dies at, the next one continues from the rows."""

    @pytest.mark.parametrize("capability", [READ, FIRE])
    async def test_after_admission_and_before_begin_the_step_is_simply_made_again(self, scene, bench, capability):
        acts = await scene(plan(capability), **{capability.replace(".", "_"): ["hang before begin"]})
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        assert await acts.drive(owner="node/2") is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "not_started"), ("s0", 2, "succeeded")]
        assert len(acts.executor.calls) == 1
        assert await bench.budget(acts.run, "run", BudgetUnit.CALLS) == (1, 0)

    async def test_during_an_idempotent_call_the_step_is_repeated_under_the_same_key(self, scene, bench):
        acts = await scene(plan(READ), thing_read=["hang"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        assert await acts.drive(owner="node/2") is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "superseded"), ("s0", 2, "succeeded")]
        assert {key for key, _, _ in acts.executor.calls} == {f"{acts.run.id}/0"}
        assert await bench.budget(acts.run, "run", BudgetUnit.CALLS) == (1, 0)

    @pytest.mark.parametrize("happened", [True, False])
    async def test_during_any_other_call_the_run_waits_until_somebody_knows(self, scene, bench, happened):
        acts = await scene(plan(FIRE, READ), thing_fire=["hang"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        assert await acts.drive(owner="node/2") is RunState.OUTCOME_UNKNOWN
        assert await acts.drive() is None
        assert len(acts.executor.calls) == 1
        await bench.storage.runs.reconcile(
            bench.tenant, acts.run.id, happened=happened, output={"seen": 1} if happened else None, actor="human:x"
        )
        assert await acts.drive() is RunState.SUCCEEDED
        assert [capability for _, capability, _ in acts.executor.calls] == [FIRE, *[FIRE] * (not happened), READ]

    @pytest.mark.parametrize("record", [{}, {"facts": []}, {"facts": {"capability": {"id": "?"}}}], ids=str)
    async def test_a_call_of_which_nobody_can_read_what_was_decided_waits_until_somebody_knows(
        self, scene, bench, record
    ):
        acts = await scene(plan(READ, READ), thing_read=["hang"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        bench.behind.set_rows("run_steps", {"run_id": acts.run.id}, decision=record)
        assert await acts.drive() is RunState.OUTCOME_UNKNOWN
        assert await bench.budget(acts.run, "tenant", BudgetUnit.CALLS) == (1, 0)
        await bench.storage.runs.reconcile(
            bench.tenant, acts.run.id, happened=True, output={"seen": 1}, actor="human:x"
        )
        assert await acts.drive() is RunState.SUCCEEDED
        assert len(acts.executor.calls) == 2
        assert await acts.consistent()

    async def test_one_that_never_began_ends_its_run_when_nobody_can_read_what_was_decided(self, scene, bench):
        acts = await scene(plan(READ), thing_read=["hang before begin"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        bench.behind.set_rows("run_steps", {"run_id": acts.run.id}, decision={})
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert (run.reason, run.message) == (
            "record_damaged",
            "what was decided of attempt 1 of step s0 cannot be read any more",
        )
        assert acts.executor.calls == []
        assert await bench.budget(run, "tenant", BudgetUnit.CALLS) == (0, 0)
        assert "record_damaged" in str(await bench.control_plane.why(bench.tenant, str(run.id)))

    async def test_during_a_call_that_is_not_registered_any_more_the_run_waits_until_somebody_knows(self, scene, bench):
        acts = await scene(plan(READ), thing_read=["hang"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        left = CapabilityRegistry([each for each in bench.control_plane.registry if each.id != READ])
        await bench.control_plane.reload(left)
        assert await acts.drive(owner="node/2") is RunState.OUTCOME_UNKNOWN
        await bench.storage.runs.reconcile(bench.tenant, acts.run.id, happened=False, output=None, actor="human:x")
        assert await acts.drive() is RunState.FAILED
        assert (await acts.fresh()).reason == "capability_unknown"
        assert await acts.consistent()

    async def test_a_call_that_might_not_be_repeated_when_it_was_granted_never_is(self, scene, bench):
        acts = await scene(plan(FIRE), thing_fire=["hang"])
        task = acts.start()
        await acts.executor.entered.wait()
        await acts.kill(task)
        anew = [each.model_copy(update={"idempotent": True}) for each in bench.control_plane.registry]
        await bench.control_plane.reload(CapabilityRegistry(anew))
        assert await acts.drive(owner="node/2") is RunState.OUTCOME_UNKNOWN

    async def test_after_the_effect_and_before_settlement_it_is_the_same_as_during_the_call(
        self, scene, bench, monkeypatch
    ):
        acts = await scene(plan(READ))
        reached = asyncio.Event()

        async def stuck(*_, **__):
            reached.set()
            await asyncio.get_running_loop().create_future()

        with monkeypatch.context() as patch:
            patch.setattr(bench.storage.admission, "settle", stuck)
            task = acts.start()
            await reached.wait()
            await acts.kill(task)
        assert await acts.drive(owner="node/2") is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "superseded"), ("s0", 2, "succeeded")]
        assert await acts.consistent()

    async def test_a_driver_that_was_only_away_writes_nothing_more(self, scene, bench):
        proceed = asyncio.Event()

        async def slow():
            acts.executor.entered.set()
            await proceed.wait()
            return Outcome(status=OutcomeStatus.SUCCEEDED, output="late", usage={"thing": Decimal(9)})

        acts = await scene(plan(READ), thing_read=[slow])
        late = acts.start()
        await acts.executor.entered.wait()
        bench.let_lease_expire(acts.run)
        assert await acts.drive(owner="node/2") is RunState.SUCCEEDED
        before = await bench.kinds(acts.run)
        proceed.set()
        assert await late is None
        assert await bench.kinds(acts.run) == before
        assert (await bench.storage.runs.mcrc(bench.tenant, acts.run.id))["connector_call_count"] == 1

    async def test_lost_replies_of_admission_and_settlement_change_nothing(self, scene, bench, monkeypatch):
        for name in ("admit", "settle"):
            original, lost = getattr(bench.storage.admission, name), []

            async def forgetful(*args, original=original, lost=lost, **kwargs):
                answer = await original(*args, **kwargs)
                if not lost:
                    lost.append(True)
                    raise StorageUnavailable("the reply was lost")
                return answer

            monkeypatch.setattr(bench.storage.admission, name, forgetful)
        acts = await scene(plan(READ))
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "succeeded")]
        assert await bench.budget(acts.run, "run", BudgetUnit.CALLS) == (1, 0)

    async def test_a_lost_reply_of_begin_means_the_call_was_not_made(self, scene, bench, monkeypatch):
        original, lost = bench.storage.admission.begin, []

        async def forgetful(*args, **kwargs):
            answer = await original(*args, **kwargs)
            if not lost:
                lost.append(True)
                raise StorageUnavailable("the reply was lost")
            return answer

        monkeypatch.setattr(bench.storage.admission, "begin", forgetful)
        acts = await scene(plan(FIRE))
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "not_started"), ("s0", 2, "succeeded")]
        assert len(acts.executor.calls) == 1

    async def test_a_process_that_was_stopped_after_begin_does_not_make_the_call(self, scene, bench, monkeypatch):
        original, moment, slept = bench.storage.admission.begin, hold.moment, [100.0, 0.0]

        async def stopped(*args, **kwargs):
            answer = await original(*args, **kwargs)
            away = slept.pop(0)
            monkeypatch.setattr(hold, "moment", lambda: moment() + away)
            return answer

        monkeypatch.setattr(bench.storage.admission, "begin", stopped)
        acts = await scene(plan(FIRE))
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "not_started"), ("s0", 2, "succeeded")]
        assert len(acts.executor.calls) == 1

    async def test_storage_that_stays_away_ends_the_driver_and_not_the_run(self, scene, bench, monkeypatch):
        acts = await scene(plan(READ))

        async def away(*_, **__):
            raise StorageUnavailable("gone")

        with monkeypatch.context() as patch:
            patch.setattr(bench.storage.admission, "settle", away)
            with pytest.raises(StorageUnavailable):
                await acts.drive()
        bench.let_lease_expire(acts.run)
        assert await acts.drive() is RunState.SUCCEEDED


class TestStopping:
    """Cancels and halts reach a call in progress through the lease's heartbeat."""

    async def test_cancelling_stops_the_call_and_ends_the_run(self, scene, bench):
        acts = await scene(plan(READ, READ), thing_read=["until cancelled"])
        task = acts.start(lease_seconds=0.3)
        await acts.executor.entered.wait()
        await bench.control_plane.cancel(bench.tenant, acts.run.id, by=bench.requester)
        assert await task is RunState.CANCELLED
        assert await acts.steps() == [("s0", 1, "cancelled")]

    @pytest.mark.parametrize("scope", list(HaltScope))
    async def test_a_halt_stops_the_call_parks_the_run_and_lifting_it_repeats_the_step(self, scene, bench, scope):
        acts = await scene(plan(READ), thing_read=["until cancelled"])
        task = acts.start(lease_seconds=0.3)
        await acts.executor.entered.wait()
        halt = await bench.halt_over(scope, acts.run)
        assert await task is RunState.HALTED
        await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s0", 1, "cancelled"), ("s0", 2, "denied"), ("s0", 3, "succeeded")]

    async def test_a_halt_lifted_while_the_call_stops_does_not_stop_the_next_one(self, scene, bench):
        async def stopped():
            acts.executor.entered.set()
            await acts.executor.cancelled.wait()
            acts.executor.cancelled.clear()
            await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
            return Outcome(status=OutcomeStatus.CANCELLED)

        async def undisturbed():
            for _ in range(20):
                await asyncio.sleep(0)
            return Outcome(status=OutcomeStatus.SUCCEEDED, output={"stopped": acts.executor.cancelled.is_set()})

        acts = await scene(plan(READ, result={"ref": "steps.s0.output.stopped"}), thing_read=[stopped, undisturbed])
        task = acts.start(lease_seconds=0.9)
        await acts.executor.entered.wait()
        halt = await bench.halt(HaltScope.TENANT)
        assert await task is RunState.SUCCEEDED
        assert (await acts.fresh()).result is False

    async def test_a_stopped_call_that_cannot_be_repeated_is_not(self, scene, bench):
        acts = await scene(plan(FIRE), thing_fire=["until cancelled"])
        task = acts.start(lease_seconds=0.3)
        await acts.executor.entered.wait()
        await bench.halt(HaltScope.TENANT)
        assert await task is RunState.FAILED
        assert await acts.steps() == [("s0", 1, "cancelled")]

    async def test_any_number_of_halts_does_not_exhaust_a_step(self, scene, bench):
        acts = await scene(plan(READ))
        for _ in range(8):
            halt = await bench.halt(HaltScope.TENANT)
            assert (await acts.drive(), await bench.state(acts.run)) == (None, RunState.HALTED)
            await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
        assert await acts.drive() is RunState.SUCCEEDED

    async def test_a_long_wait_for_the_rate_ends_with_a_cancel(self, scene, bench, monkeypatch):
        acts = await scene(plan(READ, READ), using=bench.with_policy(rate_limit={"per_second": 0.001, "burst": 1}))
        waiting, pause = asyncio.Event(), Hold.pause

        async def noticed(hold, seconds):
            waiting.set()
            await pause(hold, seconds)

        monkeypatch.setattr(Hold, "pause", noticed)
        task = acts.start(lease_seconds=0.3)
        await waiting.wait()
        await bench.control_plane.cancel(bench.tenant, acts.run.id, by=bench.requester)
        assert await task is RunState.CANCELLED


async def test_a_rate_limited_plan_waits_and_goes_on(scene, bench):
    acts = await scene(plan(*[READ] * 3), using=bench.with_policy(rate_limit={"per_second": 2, "burst": 1}))
    assert await acts.drive() is RunState.SUCCEEDED
    assert len(acts.executor.calls) == 3
    assert "denied" in {state for _, _, state in await acts.steps()}


@pytest.fixture
def locks(bench):
    """The bench with a lock on everything that it reads."""
    return bench.locking(READ)


HELD = {"capability": READ, "resource": "thing/1"}


@pytest.fixture
def waits(monkeypatch):
    """For how long runs gave their place back; they may have it again at once. Nobody waits in a place."""
    asked = []

    def at_once(code, attempt, *, retry_after_ms=0):
        asked.append(pause_seconds(code, attempt, retry_after_ms=retry_after_ms))
        return 0.0

    async def in_its_place(hold, seconds):
        raise AssertionError(f"{hold.run.id} keeps its place for {seconds} s")

    monkeypatch.setattr("plm_engine_core.agent_runtime.driver.pause_seconds", at_once)
    monkeypatch.setattr(Hold, "pause", in_its_place)
    return asked


async def test_a_run_whose_resource_is_locked_waits_for_its_turn_and_uses_up_no_refusal(scene, locks, waits):
    holder = await locks.lease()
    grant = await locks.begun(holder)
    acts = await scene(plan(HELD, HELD), using=locks)
    for refusals in range(1, MAX_PROPOSALS + 2):
        assert await acts.drive() is RunState.QUEUED, "somebody else may have its place meanwhile"
        assert locks.deliveries(acts.run) == 1 + refusals
    assert waits == [1] * len(waits), "no sooner than it was told"
    waiting = await acts.fresh()
    assert waiting.reason == "resource_locked"
    assert f"is locked by step 0 of run {holder.run.id}" in waiting.message
    told = (await why(locks.storage, locks.tenant, str(acts.run.id))).to_json()
    assert (told["reason"], told["unblocked_by"]) == ("resource_locked", "the end of that call")
    assert told["because"]["lock"]["run_id"] == str(holder.run.id)
    assert (await rebuild(locks.storage, locks.tenant))[1] == []
    await locks.settle(grant, holder)
    assert await acts.drive() is RunState.SUCCEEDED
    assert [key.partition("/")[2] for key, *_ in acts.executor.calls] == ["0", "1"]
    assert await acts.consistent()


async def test_a_run_that_waits_for_a_resource_is_cancelled_at_once(scene, locks, waits):
    await locks.begun(await locks.lease())
    acts = await scene(plan(HELD), using=locks)
    assert await acts.drive() is RunState.QUEUED
    await locks.control_plane.cancel(locks.tenant, acts.run.id, by=locks.requester)
    assert (await acts.fresh()).state is RunState.CANCELLED


async def test_a_run_that_is_being_cancelled_does_not_wait_for_a_resource(scene, locks, waits, monkeypatch):
    await locks.begun(await locks.lease())
    acts = await scene(plan(HELD), using=locks)
    waiting = Driver._wait_for_resource

    async def once_it_is_heard(driver, hold, place, refusal):
        await locks.control_plane.cancel(locks.tenant, acts.run.id, by=locks.requester)
        await hold.stop.wait()
        return await waiting(driver, hold, place, refusal)

    monkeypatch.setattr(Driver, "_wait_for_resource", once_it_is_heard)
    assert await acts.start(lease_seconds=0.3) is RunState.CANCELLED


async def test_a_run_waits_longer_for_what_somebody_has_to_say_first(scene, locks, waits):
    holder = await locks.lease()
    await locks.settle(await locks.begun(holder), holder, OutcomeStatus.OUTCOME_UNKNOWN)
    acts = await scene(plan(HELD), using=locks)
    assert await acts.drive() is RunState.QUEUED
    assert waits == [20]


async def test_a_run_that_is_given_back_for_later_is_delivered_then(locks, storage_kind):
    lease = await locks.lease()
    before = locks.deliveries(lease.run)
    left = await locks.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.QUEUED, actor="test", again_after_seconds=0.05
    )
    assert left is RunState.QUEUED
    if storage_kind == "memory":
        assert locks.deliveries(lease.run) == before
    await asyncio.sleep(0.05)  # a timer of the same loop, so it is over after that of the delivery
    assert locks.deliveries(lease.run) == before + 1


async def test_the_lock_of_a_lost_run_worker_goes_to_whoever_repeats_its_call(scene, locks, waits):
    lost = await scene(plan(HELD), using=locks, thing_read=["hang"])
    task = lost.start()
    await lost.executor.entered.wait()
    await lost.kill(task)
    acts = await scene(plan(HELD), using=locks)
    assert await acts.drive() is RunState.QUEUED
    assert await lost.drive() is RunState.SUCCEEDED, "the run that was lost is taken over"
    assert await acts.drive() is RunState.SUCCEEDED


HOSTILE = {
    "nul": "a\x00b",
    "nan": float("nan"),
    "surrogate": "\ud800",
    "name": {"\ud800": 1},
    "keys": {1: 2},
    "object": object(),
    "huge": "x" * (17 * 1024 * 1024),
    "deep": [[]],
    "digits": 10**5000,
}
for _ in range(300):
    HOSTILE["deep"] = [HOSTILE["deep"]]


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_result_the_books_cannot_hold_fails_the_step_cleanly_and_is_paid_for(scene, bench, name):
    outcome = Outcome(status=OutcomeStatus.SUCCEEDED, output={"value": HOSTILE[name]}, usage={"thing": Decimal(3)})
    acts = await scene(plan(READ), thing_read=[outcome])
    assert await acts.drive() is RunState.FAILED
    run = await acts.fresh()
    assert run.reason == "output_refused"
    assert run.message.startswith("step s0: the plugin's output")
    assert await bench.budget(run, "run", BudgetUnit.EUR) == (Decimal("0.03"), 0)


@pytest.mark.parametrize("message", ["a\x00b", "\ud800", "x" * 300_000], ids=["nul", "surrogate", "huge"])
async def test_an_error_the_books_cannot_hold_is_replaced(scene, message):
    failing = Outcome(status=OutcomeStatus.FAILED, error={"category": "fatal", "message": message})
    acts = await scene(plan(READ), thing_read=[failing])
    assert await acts.drive() is RunState.FAILED
    assert (await acts.fresh()).reason == "output_refused"


async def test_what_an_agent_claims_reaches_the_decision_and_stays_with_an_open_step(scene):
    class Agent:
        def next(self, history):
            if history.outputs():
                return Finish(succeeded=True)
            return Propose(step_id="s", capability=READ, resource="r", arguments={}, claims={"risk": "high"})

    acts = await scene(Agent())
    assert await acts.drive() is RunState.AWAITING_APPROVAL
    (step,) = await acts.bench.storage.runs.steps(acts.bench.tenant, acts.run.id)
    assert (step.decision["risk"], step.decision["facts"]["claims"]) == ("high", {"risk": "high"})
    ticket = await acts.bench.storage.approvals.get(acts.bench.tenant, step.ticket_id)
    await acts.bench.control_plane.decide(
        acts.bench.tenant, ticket.id, TicketDecision.APPROVE, approver=acts.bench.approver
    )
    assert await acts.drive() is RunState.SUCCEEDED
    (step,) = await acts.bench.storage.runs.steps(acts.bench.tenant, acts.run.id)
    assert step.decision["facts"]["claims"] == {"risk": "high"}


class TestDefects:
    """Of agents and executors: they end the run or the step, never the driver."""

    @pytest.mark.parametrize(("capability", "end"), [(READ, "succeeded"), (FIRE, "outcome_unknown")])
    async def test_an_executor_that_raises_during_a_call_leaves_its_outcome_open(self, scene, capability, end):
        acts = await scene(plan(capability), **{capability.replace(".", "_"): [RuntimeError("broken\x00")]})
        assert (await acts.drive()).value == end

    @pytest.mark.parametrize(
        ("move", "reason"),
        [
            (ZeroDivisionError("a\x00defect"), "agent_failed"),
            ("nonsense", "agent_failed"),
            (Propose(step_id="s", capability=READ, resource="r", arguments={"x": "\x00"}), "invalid_proposal"),
            (Propose(step_id="\x00", capability=READ, resource="r", arguments={}), "invalid_proposal"),
            (Propose(step_id="s", capability=READ, resource="\ud800", arguments={}), "invalid_proposal"),
            (Propose(step_id="s", capability=READ, resource="r", arguments={}, claims="high"), "invalid_proposal"),
            (Propose(step_id="s", capability=READ, resource="r", arguments={}, claims={"x": NAN}), "invalid_proposal"),
            (Propose(step_id="s", capability=[READ], resource="r", arguments={}), "invalid_proposal"),
            (Propose(step_id="s", capability=READ, resource="r", arguments=[1]), "invalid_proposal"),
            (Propose(step_id=None, capability=READ, resource="r", arguments={}), "invalid_proposal"),
            (Propose(step_id="s", capability="no.such", resource="r", arguments={}), "attempts_exhausted"),
            (Finish(succeeded=True, result={"x": object()}), "result_refused"),
            (Finish(succeeded=False, reason="x", message="\x00\ud800"), "x"),
        ],
        ids=[
            "raises",
            "no move",
            "NUL argument",
            "NUL step",
            "surrogate resource",
            "claims no object",
            "claims no JSON",
            "capability no text",
            "arguments no object",
            "step no text",
            "unknown capability",
            "no JSON result",
            "NUL message",
        ],
    )
    async def test_an_agent_that_misbehaves_ends_its_own_run(self, scene, move, reason):
        class Agent:
            def next(self, history):
                if isinstance(move, Exception):
                    raise move
                return move

        acts = await scene(Agent())
        assert await acts.drive() is RunState.FAILED
        assert (await acts.fresh()).reason == reason

    async def test_an_agent_may_be_refused_three_times_at_a_step(self, scene, bench):
        class Stubborn:
            def next(self, history):
                return Propose(step_id="s", capability=READ, resource="r", arguments={"try": len(history.steps)})

        using = bench.with_policy(tiers={READ: "steer"}, guidance={READ: "read less"})
        acts = await scene(Stubborn(), using=using)
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert run.reason == "attempts_exhausted"
        assert await acts.steps() == [("s", attempt, "steered") for attempt in (1, 2, 3)]

    async def test_a_steered_agent_sees_the_guidance_and_may_do_something_else(self, scene, bench):
        class Docile:
            def next(self, history):
                if not history.steps:
                    return Propose(step_id="s", capability=FIRE, resource="r", arguments={})
                last = history.steps[-1]
                if last.state is StepState.STEERED:
                    guided = last.decision["guidance"]
                    return Propose(step_id="s", capability=guided, resource="r", arguments={})
                return Finish(succeeded=True)

        acts = await scene(Docile(), using=bench.with_policy(tiers={FIRE: "steer"}, guidance={FIRE: READ}))
        assert await acts.drive() is RunState.SUCCEEDED
        assert await acts.steps() == [("s", 1, "steered"), ("s", 2, "succeeded")]

    async def test_a_step_that_never_starts_is_given_up(self, scene):
        never = Outcome(status=OutcomeStatus.NOT_STARTED, error={"category": "plugin_not_ready", "message": "no disk"})
        acts = await scene(plan(READ), thing_read=[never] * 9)
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert run.reason == "attempts_exhausted"
        assert run.message == "step s0: refused or come to nothing 6 times; the last time: no disk"

    async def test_losing_its_run_workers_does_not_use_a_steps_attempts_up(self, scene):
        acts = await scene(plan(READ), thing_read=["hang"] * 8)
        for _ in range(8):
            acts.executor.entered.clear()
            lost = acts.start()
            await asyncio.wait_for(acts.executor.entered.wait(), 30)
            await acts.kill(lost)
        assert await acts.drive() is RunState.SUCCEEDED
        assert (await acts.steps())[-2:] == [("s0", 8, "superseded"), ("s0", 9, "succeeded")]

    async def test_a_step_that_loses_every_run_worker_is_given_up_in_the_end(self, scene):
        acts = await scene(plan(READ), thing_read=["hang before begin", *["hang"] * 30])
        for _ in range(MAX_LOSSES):
            acts.executor.entered.clear()
            lost = acts.start()
            await asyncio.wait_for(acts.executor.entered.wait(), 30)
            await acts.kill(lost)
        assert await acts.drive() is RunState.FAILED
        run = await acts.fresh()
        assert run.reason == "attempts_exhausted"
        assert f"its run worker was lost {MAX_LOSSES} times" in run.message

    async def test_a_capability_nobody_here_offers_ends_the_run(self, scene):
        acts = await scene(plan(READ))
        acts.executor.offers = lambda _: False
        assert await acts.drive() is RunState.FAILED
        assert (await acts.fresh()).reason == "capability_unavailable"


async def test_many_runs_share_one_driver(scene, bench):
    acts = await scene(plan(READ, READ))
    runs = [await bench.run() for _ in range(8)]
    driver = acts.driver()
    ends = await asyncio.gather(*(driver.drive(bench.tenant, run.id) for run in runs))
    assert ends == [RunState.SUCCEEDED] * 8
    assert await bench.budget(runs[0], "tenant", BudgetUnit.CALLS) == (16, 0)
    assert await acts.consistent()
