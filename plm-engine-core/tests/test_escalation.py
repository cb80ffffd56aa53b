"""Escalation of a failure: before a run fails as exhausted or beyond its autonomy, a human is asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from plm_engine_core.agent_runtime import AskInput, Driver, Finish, Plan, PlanAgent, Propose, Selector
from plm_engine_core.agent_runtime.escalation import Escalation, escalates
from plm_engine_core.control_plane import ControlPlane, Denied, InputRequest, Outcome
from plm_engine_core.control_plane.admission.ask import Failure
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.events import rebuild
from plm_engine_core.control_plane.events.event import run_stream
from plm_engine_core.control_plane.policy import read_policy
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.vocabulary import BudgetUnit, HaltScope, OutcomeStatus, RunState, TicketState
from plm_engine_core.control_plane.why import why
from plm_engine_core.testing.approvers import approve_all, deny_all, give_input

READ, WRITE = "thing.read", "thing.write"
NEVER = Outcome(status=OutcomeStatus.NOT_STARTED, error={"category": "plugin_not_ready", "message": "no disk"})
EXHAUSTED = "step s0: refused or come to nothing 6 times; the last time: no disk"

pytestmark = pytest.mark.every_storage


class Scripted:
    """Answers each call with the next entry of its script, then with success; it remembers which step keys began."""

    def __init__(self, *script):
        self.script, self.calls, self.entered = list(script), [], asyncio.Event()

    def offers(self, capability):
        return capability.id in (READ, WRITE)

    async def cancel(self, grant):
        raise AssertionError("nothing is cancelled here")

    async def execute(self, call, grant, progress):
        entry = self.script.pop(0) if self.script else None
        if entry is NEVER:
            return entry
        await call.begin()
        self.calls.append((call.step_key, dict(call.arguments)))
        if entry == "hang":
            self.entered.set()
            await asyncio.get_running_loop().create_future()
        return Outcome(status=OutcomeStatus.SUCCEEDED, output=dict(call.arguments))


class Scene:
    """A run, its agent and executor, and drivers that take turns."""

    def __init__(self, bench, agent, *script):
        self.bench, self.agent, self.executor = bench, agent, Scripted(*script)

    async def drive(self):
        driver = Driver(
            control_plane=self.bench.control_plane,
            agents=lambda _: self.agent,
            selector=Selector([self.executor]),
            owner="node/1",
        )
        return await driver.drive(self.bench.tenant, self.run.id)

    def under(self, **approval):
        """The policy that decides from now on."""
        self.bench = self.bench.with_policy(**policy(**approval))

    async def fresh(self):
        return await self.bench.storage.runs.get(self.bench.tenant, self.run.id)

    async def steps(self):
        return await self.bench.storage.runs.steps(self.bench.tenant, self.run.id)

    async def places(self):
        return [(each.step_index, each.attempt, each.step_id, each.state.value) for each in await self.steps()]

    async def tickets(self):
        return await self.bench.storage.approvals.list(self.bench.tenant, limit=99, after=None, state=None)

    async def events(self, kind):
        found = await self.bench.storage.events.read(self.bench.tenant, run_stream(self.run.id))
        return [event for event in found if event.kind == kind]

    async def again(self):
        return await give_input(self.bench.control_plane, self.bench.tenant, "again")


def policy(rule=None, **changes):
    return {"approval": {"input": {} if rule is None else rule}, **changes}


def plan(*capabilities, arguments=None):
    steps = [
        {"id": f"s{number}", "capability": each, "arguments": arguments or {"x": 1}}
        for number, each in enumerate(capabilities)
    ]
    return PlanAgent(Plan.model_validate({"agent": "test", "version": "1", "steps": steps}))


@pytest.fixture
def scene(bench, monkeypatch):
    monkeypatch.setattr("plm_engine_core.agent_runtime.retry._jittered", lambda _: 0)

    async def make(agent, *script, **changes):
        made = Scene(bench.with_policy(**(changes or policy())), agent, *script)
        made.run = await made.bench.run()
        return made

    return make


class TestExhausted:
    """A step that came to nothing so often that it is not tried once more."""

    async def test_a_human_is_asked_before_the_run_fails(self, scene, bench):
        acts = await scene(plan(READ), *[NEVER] * 6)
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        (ticket,) = await acts.tickets()
        assert (ticket.step_index, ticket.attempt, ticket.arguments["schema"]) == (0, 7, {"const": "again"})
        assert ticket.arguments["question"].startswith(f"The run would fail as attempts_exhausted: {EXHAUSTED}\n")
        assert 'Answer "again"' in ticket.arguments["question"]
        assert (await acts.places())[-1] == (0, 7, "s0/escalation", "awaiting_approval")
        failure = Failure(step=0, attempt=6, reason="attempts_exhausted", message=EXHAUSTED)
        assert [escalates(step) for step in await acts.steps()] == [None] * 6 + [failure]
        assert (await bench.kinds(acts.run))[-2:] == ["escalation_raised", "approval_requested"]
        (raised,) = await acts.events("escalation_raised")
        assert raised.data == {
            "step": 0,
            "attempt": 6,
            "reason": "attempts_exhausted",
            "message": EXHAUSTED,
            "ticket_id": str(ticket.id),
        }
        assert await bench.budget(acts.run, "run", BudgetUnit.CALLS) == (0, 0)
        told = await why(bench.storage, bench.tenant, str(acts.run.id))
        assert (told.reason, told.unblocked_by) == (
            "input_required",
            "an input by a person with plm.hitl.resolve within 3600 s",
        )
        assert EXHAUSTED in told.message
        assert (await rebuild(bench.storage, bench.tenant))[1] == []

    async def test_after_again_the_same_proposal_is_made_under_its_step_key(self, scene, bench):
        acts = await scene(plan(READ, READ, arguments={"x": 7}), *[NEVER] * 6)
        await acts.drive()
        assert await approve_all(acts.bench.control_plane, acts.bench.tenant) == [], "nobody approves an escalation"
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED
        assert acts.executor.calls == [(f"{acts.run.id}/0", {"x": 7}), (f"{acts.run.id}/1", {"x": 7})]
        assert (await acts.places())[6:] == [
            (0, 7, "s0/escalation", "succeeded"),
            (0, 8, "s0", "succeeded"),
            (1, 1, "s1", "succeeded"),
        ]
        assert (await rebuild(bench.storage, bench.tenant))[1] == []
        assert all(each.consistent for each in await bench.control_plane.verify_events(bench.tenant))

    async def test_again_gives_all_its_tries_once_more_and_then_asks_once_more(self, scene):
        acts = await scene(plan(READ), *[NEVER] * 12)
        await acts.drive()
        await acts.again()
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        assert [place[1] for place in await acts.places() if place[2] == "s0/escalation"] == [7, 14]
        assert [event.data["attempt"] for event in await acts.events("escalation_raised")] == [6, 13]
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED

    async def test_what_was_lost_keeps_its_step_key(self, scene, bench):
        acts = await scene(plan(READ), "hang", *[NEVER] * 6)
        lost = asyncio.create_task(acts.drive())
        await asyncio.wait_for(acts.executor.entered.wait(), 30)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        bench.let_lease_expire(acts.run)
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED
        assert [key for key, _ in acts.executor.calls] == [f"{acts.run.id}/0"] * 2

    async def test_a_call_that_must_not_be_repeated_any_more_is_not_whatever_was_answered(self, scene, bench):
        acts = await scene(plan(READ), "hang", *[NEVER] * 6)
        lost = asyncio.create_task(acts.drive())
        await asyncio.wait_for(acts.executor.entered.wait(), 30)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        bench.let_lease_expire(acts.run)
        await acts.drive()
        await acts.again()
        plane = acts.bench.control_plane
        other = [each.model_copy(update={"idempotent": each.id != READ}) for each in plane.registry]
        plane = ControlPlane(policy=plane.policy, registry=CapabilityRegistry(other), storage=plane.storage)
        acts.bench = replace(acts.bench, control_plane=plane)
        assert await acts.drive() is RunState.FAILED
        assert ((await acts.fresh()).reason, len(acts.executor.calls)) == ("capability_changed", 1)

    async def test_what_is_refused_is_proposed_again_too(self, scene, bench):
        class Stubborn:
            def next(self, history):
                last = history.latest("s")
                if last is not None and last.output is not None:
                    return Finish(succeeded=True, result=len(history.steps))
                return Propose(step_id="s", capability=READ, resource="r", arguments={"n": len(history.steps)})

        acts = await scene(Stubborn(), **policy(tiers={READ: "steer"}, guidance={READ: "read\n\x1b[31mless\u202e"}))
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        (ticket,) = await acts.tickets()
        assert "refused or come to nothing 3 times" in ticket.arguments["question"]
        assert all(each.isprintable() or each == "\n" for each in ticket.arguments["question"])
        acts.under()
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED
        assert acts.executor.calls == [(f"{acts.run.id}/0", {"n": 2})], "what the third attempt was"
        assert (await acts.fresh()).result == 4, "the agent is not shown what the driver asked"

    @pytest.mark.parametrize("over", ["denied", "expired"])
    async def test_without_it_the_run_fails_as_it_would_have(self, scene, bench, over):
        acts = await scene(plan(READ), *[NEVER] * 6)
        await acts.drive()
        if over == "denied":
            await deny_all(acts.bench.control_plane, acts.bench.tenant, comment="leave it")
        else:
            bench.behind.set_time("approval_tickets", "deadline", -1, {"run_id": acts.run.id})
        assert await acts.drive() is RunState.FAILED
        left = await acts.fresh()
        told = "no input was given: leave it" if over == "denied" else "nobody gave the input until"
        assert left.reason == "attempts_exhausted"
        assert left.message.startswith(f"{EXHAUSTED}; a human was to be asked: {told}")
        assert len(await acts.tickets()) == 1

    async def test_who_answers_says_again_or_denies(self, scene):
        acts = await scene(plan(READ), *[NEVER] * 6)
        await acts.drive()
        with pytest.raises(InvalidRequest, match="input"):
            await give_input(acts.bench.control_plane, acts.bench.tenant, {"x": 2})
        (ticket,) = await acts.tickets()
        assert ticket.state is TicketState.PENDING
        with pytest.raises(Forbidden):
            await acts.bench.control_plane.provide_input(
                acts.bench.tenant, ticket.id, "again", approver=replace(acts.bench.approver, scopes=frozenset())
            )

    async def test_of_asks_that_nobody_answers_nobody_is_asked(self, scene):
        class Asking:
            def next(self, history):
                return AskInput(step_id="q", question="Well?")

        acts = await scene(Asking())
        for _ in range(3):
            assert await acts.drive() is RunState.AWAITING_APPROVAL
            await deny_all(acts.bench.control_plane, acts.bench.tenant)
        assert await acts.drive() is RunState.FAILED
        assert (await acts.fresh()).reason == "attempts_exhausted"
        assert await acts.events("escalation_raised") == []

    async def test_hostile_words_are_shown_plainly_and_to_a_bound(self, scene):
        loud = Outcome(
            status=OutcomeStatus.NOT_STARTED, error={"category": "x", "message": "\x1b[2J\u202e\n" + "A" * 3_000}
        )

        class Loud(Scripted):
            async def execute(self, call, grant, progress):
                return loud

        acts = await scene(plan(READ))
        acts.executor = Loud()
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        (raised,) = await acts.events("escalation_raised")
        assert raised.data["message"].isprintable()
        assert "\\x1b[2J\\u202e\\n" in raised.data["message"]
        assert (len(raised.data["message"]), raised.data["message"][-1]) == (1_000, "…")


class TestAutonomy:
    """An agent that ends because its last proposal was beyond its autonomy."""

    LOW = policy(autonomy_ceiling="L1", tiers={WRITE: "auto_approve"})
    HIGH = policy(autonomy_ceiling="L3", tiers={WRITE: "unrestricted"})

    async def test_a_human_is_asked_and_a_wider_policy_lets_it_go_on(self, scene):
        acts = await scene(plan(WRITE), **self.LOW)
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        (raised,) = await acts.events("escalation_raised")
        assert (raised.data["step"], raised.data["attempt"], raised.data["reason"]) == (0, 1, "autonomy_too_low")
        acts.bench = acts.bench.with_policy(**self.HIGH)
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED
        assert acts.executor.calls == [(f"{acts.run.id}/0", {"x": 1})]
        assert [place[1:] for place in await acts.places()] == [
            (1, "s0", "denied"),
            (2, "s0/escalation", "succeeded"),
            (3, "s0", "succeeded"),
        ]

    async def test_while_it_stays_too_low_it_is_asked_again_so_often_and_then_fails(self, scene):
        low = {**self.LOW, "approval": {"input": {"max_per_run": 2}}}
        acts = await scene(plan(WRITE), **low)
        for _ in range(2):
            assert await acts.drive() is RunState.AWAITING_APPROVAL
            await acts.again()
        assert await acts.drive() is RunState.FAILED
        left = await acts.fresh()
        assert left.reason == "autonomy_too_low"
        assert left.message.endswith("; a human was to be asked: the policy lets a run ask 2 times")
        assert (len(await acts.tickets()), len(await acts.events("escalation_raised"))) == (2, 2)
        assert acts.executor.calls == [], "again allows nothing"

    async def test_denied_it_fails_for_its_reason(self, scene):
        acts = await scene(plan(WRITE), **self.LOW)
        await acts.drive()
        await deny_all(acts.bench.control_plane, acts.bench.tenant, comment="no")
        assert await acts.drive() is RunState.FAILED
        left = await acts.fresh()
        assert (left.reason, left.message.startswith("step s0: ")) == ("autonomy_too_low", True)
        assert left.message.endswith("; a human was to be asked: no input was given: no")

    async def test_an_agent_may_propose_something_else_first(self, scene):
        class Modest:
            def next(self, history):
                if not history.steps:
                    return Propose(step_id="s", capability=WRITE, resource="r", arguments={})
                if history.outputs():
                    return Finish(succeeded=False, reason="enough", message="of this")
                return Propose(step_id="s", capability=READ, resource="r", arguments={"x": 1})

        acts = await scene(Modest(), **self.LOW)
        assert await acts.drive() is RunState.FAILED
        assert ((await acts.fresh()).reason, await acts.tickets()) == ("enough", [])

    async def test_an_agent_that_breaks_down_has_failed_by_itself(self, scene):
        class Broken:
            def next(self, history):
                if history.steps:
                    raise RuntimeError("a defect")
                return Propose(step_id="s", capability=WRITE, resource="r", arguments={})

        acts = await scene(Broken(), **self.LOW)
        assert await acts.drive() is RunState.FAILED
        assert ((await acts.fresh()).reason, await acts.tickets()) == ("agent_failed", [])


class TestWhereThePolicyHasNone:
    """Runs fail as they did."""

    @pytest.mark.parametrize("approval", [{}, {"input": {"failures": False}}], ids=["no input", "no failures"])
    async def test_nobody_is_asked(self, scene, approval):
        acts = await scene(plan(READ), *[NEVER] * 6, approval=approval)
        assert await acts.drive() is RunState.FAILED
        assert ((await acts.fresh()).reason, (await acts.fresh()).message) == ("attempts_exhausted", EXHAUSTED)
        denied = await scene(plan(WRITE), **{**TestAutonomy.LOW, "approval": approval})
        assert await denied.drive() is RunState.FAILED
        assert (await denied.fresh()).reason == "autonomy_too_low"
        assert len(await denied.steps()) == 1
        assert await acts.tickets() == []

    def test_a_policy_that_says_nothing_of_it_keeps_its_digest(self, bench):
        said = bench.with_policy(approval={"input": {"failures": True}}).control_plane.policy
        unsaid = bench.with_policy(approval={"input": {}}).control_plane.policy
        other = bench.with_policy(approval={"input": {"failures": False}}).control_plane.policy
        assert (said.digest, "failures" in said.content) == (unsaid.digest, False)
        assert other.digest != said.digest
        assert read_policy(other.content, source="x").approval.input.failures is False
        assert read_policy(said.content, source="x") == said

    async def test_the_ask_itself_is_refused_by_a_policy_that_came_in_between(self, bench):
        using = bench.with_policy(approval={"input": {"failures": False}})
        lease = await using.lease()
        answer = await using.control_plane.ask(
            InputRequest(
                tenant_id=using.tenant,
                run_id=lease.run.id,
                fencing_token=lease.fencing_token,
                step_index=0,
                attempt=1,
                step_id="s/escalation",
                question="Well?",
                principal=lease.run.principal,
                escalates=Failure(step=0, attempt=1, reason="attempts_exhausted", message="so"),
            )
        )
        assert isinstance(answer, Denied)
        assert (answer.reason.value, answer.rule) == ("input_not_allowed", "approval.input.failures")
        assert "escalation_raised" not in await using.kinds(lease.run)


class TestForged:
    """No agent can have its own question taken for one of the driver."""

    async def test_an_agents_ask_under_the_same_name_is_its_own(self, scene):
        class Forging:
            def next(self, history):
                told = history.outputs().get("s0/escalation")
                if told is not None:
                    return Finish(succeeded=True, result=told)
                return AskInput(step_id="s0/escalation", question="Well?", schema={"const": "again"})

        acts = await scene(Forging())
        await acts.drive()
        assert await acts.events("escalation_raised") == []
        await acts.again()
        assert await acts.drive() is RunState.SUCCEEDED
        assert ((await acts.fresh()).result, [escalates(step) for step in await acts.steps()]) == ("again", [None])

    async def test_it_is_no_move_of_an_agent(self, scene):
        failure = Failure(step=0, attempt=1, reason="x", message="y")

        class Forging:
            def next(self, history):
                return Escalation(step_id="s", question="Well?", schema={}, failure=failure)

        acts = await scene(Forging())
        assert await acts.drive() is RunState.FAILED
        assert ((await acts.fresh()).reason, await acts.tickets()) == ("agent_failed", [])

    async def test_nor_has_its_ask_a_member_for_it(self, scene):
        class Sly(AskInput):
            failure = Failure(step=0, attempt=1, reason="x", message="y")
            escalates = failure

        class Forging:
            def next(self, history):
                return Sly(step_id="s", question="Well?")

        acts = await scene(Forging())
        assert await acts.drive() is RunState.AWAITING_APPROVAL
        assert (await acts.events("escalation_raised"), escalates((await acts.steps())[0])) == ([], None)

    async def test_nor_is_a_proposal_of_that_word_one(self, scene):
        class Forging:
            def next(self, history):
                claims = {"escalates": {"step": 0, "attempt": 1, "reason": "x", "message": "y"}}
                return Propose(step_id="s", capability="provide_input", resource="r", arguments=claims, claims=claims)

        acts = await scene(Forging())
        assert await acts.drive() is RunState.FAILED
        assert (await acts.fresh()).reason == "attempts_exhausted"
        assert [escalates(step) for step in await acts.steps()] == [None] * 3


@pytest.mark.parametrize("point", ["before it is booked", "after it is booked", "before the call", "in the call"])
async def test_a_driver_that_is_killed_asks_once_and_another_goes_on(scene, bench, monkeypatch, point):
    script = [NEVER] * 6 + (["hang"] if point == "in the call" else [])
    acts = await scene(plan(READ), *script)
    reached = acts.executor.entered if point == "in the call" else asyncio.Event()
    approvals, plane = acts.bench.storage.approvals, acts.bench.control_plane
    ask, admit = approvals.ask, plane.admit

    async def hang():
        reached.set()
        await asyncio.get_running_loop().create_future()

    async def dying_ask(command):
        if point == "before it is booked":
            await hang()
        await ask(command)
        await hang()

    async def dying_admit(proposal):
        await hang()

    async def killed():
        task = asyncio.create_task(acts.drive())
        await asyncio.wait_for(reached.wait(), 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    if "booked" in point:
        monkeypatch.setattr(approvals, "ask", dying_ask)
        await killed()
        monkeypatch.setattr(approvals, "ask", ask)
    else:
        await acts.drive()
        await acts.again()
        if point == "before the call":
            monkeypatch.setattr(plane, "admit", dying_admit)
        await killed()
        monkeypatch.setattr(plane, "admit", admit)
    if point != "after it is booked":
        bench.let_lease_expire(acts.run)
    if "booked" in point:
        assert await acts.drive() in (RunState.AWAITING_APPROVAL, None)
        await acts.again()
    assert await acts.drive() is RunState.SUCCEEDED
    assert (len(await acts.tickets()), len(await acts.events("escalation_raised"))) == (1, 1)
    assert {key for key, _ in acts.executor.calls} == {f"{acts.run.id}/0"}


async def test_under_a_halt_nothing_is_booked_and_it_is_asked_after_it(scene, monkeypatch):
    acts = await scene(plan(READ), *[NEVER] * 6)
    halts = []

    async def halted_meanwhile(request, ask=acts.bench.control_plane.ask):
        if not halts:
            halts.append(await acts.bench.halt(HaltScope.TENANT))
        return await ask(request)

    monkeypatch.setattr(acts.bench.control_plane, "ask", halted_meanwhile)
    assert await acts.drive() is RunState.HALTED
    assert (await acts.tickets(), len(await acts.steps())) == ([], 6)
    await acts.bench.control_plane.lift(acts.bench.tenant, halts[0].id, by=acts.bench.approver)
    assert await acts.drive() is RunState.AWAITING_APPROVAL
    assert len(await acts.tickets()) == 1
