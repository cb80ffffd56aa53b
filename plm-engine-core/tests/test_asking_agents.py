"""Agents that ask: the driver parks their run, and their next turn finds the answer, or why there is none."""

from __future__ import annotations

import json

import pytest
from plm_engine_core.agent_runtime import AskInput, Driver, Finish, Plan, PlanAgent, Selector, load_plan
from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.vocabulary import HaltScope, RunState, StepState, TicketState
from plm_engine_core.testing.approvers import approve_all, deny_all, give_input

pytestmark = pytest.mark.every_storage


class Asking:
    """Asks until it was told, and ends with what it was told; it counts its turns."""

    def __init__(self, *questions, patient=True):
        self.questions, self.patient, self.turns = questions, patient, 0

    def next(self, history):
        self.turns += 1
        told = history.outputs()
        for number, question in enumerate(self.questions):
            latest = history.latest(f"q{number}")
            refused = latest is not None and latest.state is StepState.DENIED
            if refused and not self.patient:
                return Finish(succeeded=False, reason=latest.error["reason"], message=latest.error["message"])
            if f"q{number}" not in told:
                return AskInput(step_id=f"q{number}", question=question, schema={"type": "integer"})
        return Finish(succeeded=True, result=told)


@pytest.fixture
def driven(bench):
    """Drives a run of an agent, under a policy that lets it ask."""

    async def make(agent, **rule):
        using = bench.with_policy(approval={"input": rule})
        run = await using.run()
        driver = Driver(
            control_plane=using.control_plane, agents=lambda _: agent, selector=Selector([]), owner="node/1"
        )

        async def drive():
            return await driver.drive(using.tenant, run.id)

        return using, run, drive

    return make


async def test_the_next_turn_finds_the_answer_as_the_output_of_its_step(driven):
    agent = Asking("How many?", "How long?")
    using, run, drive = await driven(agent)
    for answer in (3, 4):
        assert await drive() is RunState.AWAITING_APPROVAL
        (ticket,) = await give_input(using.control_plane, using.tenant, answer)
        assert (ticket.state, ticket.input) == (TicketState.APPROVED, answer)
    assert await drive() is RunState.SUCCEEDED
    assert (await using.storage.runs.get(using.tenant, run.id)).result == {"q0": 3, "q1": 4}
    steps = await using.storage.runs.steps(using.tenant, run.id)
    assert [(step.step_index, step.attempt, step.state.value) for step in steps] == [
        (0, 1, "succeeded"),
        (1, 1, "succeeded"),
    ]
    assert agent.turns == 3, "a turn for each ask and one for the end: an answered step is not asked again"


async def test_an_agent_is_told_that_it_got_no_answer(driven):
    using, run, drive = await driven(Asking("How many?", patient=False))
    await drive()
    await deny_all(using.control_plane, using.tenant, comment="none of your business")
    assert await drive() is RunState.FAILED
    left = await using.storage.runs.get(using.tenant, run.id)
    assert (left.reason, left.message) == ("input_denied", "no input was given: none of your business")


async def test_who_gets_no_answer_thrice_is_not_heard_again(driven):
    using, run, drive = await driven(Asking("How many?"))
    for _ in range(3):
        assert await drive() is RunState.AWAITING_APPROVAL
        await deny_all(using.control_plane, using.tenant)
    assert await drive() is RunState.FAILED
    assert (await using.storage.runs.get(using.tenant, run.id)).reason == "attempts_exhausted"


async def test_who_may_not_ask_is_refused_thrice_too(bench):
    run = await bench.run()
    agent = Asking("How many?")
    driver = Driver(control_plane=bench.control_plane, agents=lambda _: agent, selector=Selector([]), owner="node/1")
    assert await driver.drive(bench.tenant, run.id) is RunState.FAILED
    assert agent.turns == 4
    left = await bench.storage.runs.get(bench.tenant, run.id)
    assert "the policy lets no agent ask" in left.message


async def test_a_deadline_that_passes_is_found_by_whoever_takes_the_run_up(driven, bench):
    using, run, drive = await driven(Asking("How many?", patient=False))
    await drive()
    bench.behind.set_time("approval_tickets", "deadline", -1, {"run_id": run.id})
    assert await drive() is RunState.FAILED
    assert (await using.storage.runs.get(using.tenant, run.id)).reason == "input_expired"


async def test_a_question_that_cannot_be_asked_ends_the_run_with_the_reason(driven):
    using, run, drive = await driven(Asking(""))
    assert await drive() is RunState.FAILED
    left = await using.storage.runs.get(using.tenant, run.id)
    assert (left.reason, "'question' must be" in left.message) == ("invalid_proposal", True)


async def test_under_a_halt_the_run_is_parked_and_asks_after_it(driven, monkeypatch):
    agent = Asking("How many?")
    using, _run, drive = await driven(agent)
    turn = agent.next
    halts = []

    async def halted_meanwhile(request, ask=using.control_plane.ask):
        if not halts:
            halts.append(await using.halt(HaltScope.TENANT))
        return await ask(request)

    monkeypatch.setattr(using.control_plane, "ask", halted_meanwhile)
    assert await drive() is RunState.HALTED
    assert await using.storage.approvals.list(using.tenant, limit=9, after=None, state=None) == []
    await using.control_plane.lift(using.tenant, halts[0].id, by=using.approver)
    assert await drive() is RunState.AWAITING_APPROVAL
    assert turn.__self__.turns == 2


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_an_ask_whose_reply_is_lost_is_asked_once(driven, monkeypatch, lost):
    using, _run, drive = await driven(Asking("How many?"))
    monkeypatch.setattr("plm_engine_core.agent_runtime.retry._jittered", lambda _: 0)
    failures = ["once"]
    ask = using.storage.approvals.ask

    async def losing(command):
        if lost == "before" and failures:
            raise StorageUnavailable(failures.pop())
        answer = await ask(command)
        if failures:
            raise StorageUnavailable(failures.pop())
        return answer

    monkeypatch.setattr(using.storage.approvals, "ask", losing)
    assert await drive() is RunState.AWAITING_APPROVAL
    assert len(await using.storage.approvals.list(using.tenant, limit=9, after=None, state=None)) == 1
    await give_input(using.control_plane, using.tenant, 3)
    assert await drive() is RunState.SUCCEEDED


class TestPlan:
    """A plan may ask."""

    STEPS = (
        {"id": "many", "ask": {"question": "How many?", "schema": {"type": "integer"}}},
        {"id": "read", "capability": "thing.read", "arguments": {"count": {"ref": "steps.many.output"}}},
    )

    def plan(self, *steps, **rest):
        return Plan.model_validate({"agent": "test", "version": "1", "steps": list(steps), **rest})

    async def test_its_answer_stands_where_it_is_referred_to(self, driven):
        plan = self.plan(self.STEPS[0], result={"wanted": {"ref": "steps.many.output"}})
        using, run, drive = await driven(PlanAgent(plan))
        assert await drive() is RunState.AWAITING_APPROVAL
        assert await approve_all(using.control_plane, using.tenant) == [], "nobody approves a question"
        await give_input(using.control_plane, using.tenant, 3)
        assert await drive() is RunState.SUCCEEDED
        assert (await using.storage.runs.get(using.tenant, run.id)).result == {"wanted": 3}

    async def test_no_answer_ends_it(self, driven):
        using, run, drive = await driven(PlanAgent(self.plan(self.STEPS[0])))
        await drive()
        await deny_all(using.control_plane, using.tenant, comment="no")
        assert await drive() is RunState.FAILED
        left = await using.storage.runs.get(using.tenant, run.id)
        assert (left.reason, left.message) == ("input_denied", "step many: no input was given: no")

    def test_it_is_stored_as_it_was_written(self):
        plan = self.plan(*self.STEPS)
        stored = plan.to_json()["plan"]
        assert stored["steps"][0]["ask"] == self.STEPS[0]["ask"]
        assert "ask" not in stored["steps"][1]
        assert Plan.model_validate(stored) == plan

    def test_a_plan_that_asks_nothing_keeps_its_digest(self):
        plan = self.plan({"id": "read", "capability": "thing.read"})
        assert plan.digest == "3b06bc8e0572212de09f2e94794d399ff0f5658a90a5a2ce562f67927ede8ac6"

    @pytest.mark.parametrize(
        ("step", "words"),
        [
            ({}, "a step names a capability, or says what to ask"),
            ({"capability": "thing.read", "ask": {"question": "q"}}, "has no capability"),
            ({"ask": {"question": ""}}, "'question' must be"),
            ({"ask": {"question": "q", "schema": {"$ref": "#"}}}, r"must not have \$ref"),
            ({"ask": {"question": "q", "schema": {"type": "strange"}}}, "'schema' cannot be used"),
        ],
        ids=range(5),
    )
    def test_what_cannot_be_asked_is_no_plan(self, tmp_path, step, words):
        path = tmp_path / "plan.json"
        path.write_text(self.written(step))
        with pytest.raises(InvalidRequest, match=words):
            load_plan(path)

    def written(self, step):
        return json.dumps({"agent": "test", "version": "1", "steps": [{"id": "one", **step}]})


async def test_a_ticket_of_either_kind_is_answered_in_its_own_way(bench):
    using = bench.with_policy(approval={"input": {}})
    await using.ask()
    run = await using.run()
    agent = Asking("How many?")
    driver = Driver(control_plane=using.control_plane, agents=lambda _: agent, selector=Selector([]), owner="node/1")
    await driver.drive(using.tenant, run.id)
    (approved,) = await approve_all(using.control_plane, using.tenant)
    (answered,) = await give_input(using.control_plane, using.tenant, 3)
    assert (approved.capability, answered.run_id) == ("thing.write", run.id)
    pending = await using.storage.approvals.list(using.tenant, limit=9, after=None, state=TicketState.PENDING)
    assert pending == []
