"""Evaluators of the phases `input` and `output`: what they do not allow creates no run, and is in no book."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar

import psycopg
import pytest
from plm_engine_core.control_plane import ArtifactRecord, ControlPlane, Outcome
from plm_engine_core.control_plane.admission.evaluators import BUILT_IN, EvaluatorRegistry, EvaluatorResult
from plm_engine_core.control_plane.admission.proposal import content_hash
from plm_engine_core.control_plane.admission.withheld import OUTPUT_WITHHELD, withheld_of
from plm_engine_core.control_plane.errors import (
    IdempotencyConflict,
    InputRefused,
    InvalidRequest,
    NotFound,
    StorageUnavailable,
)
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.registry import Delegation
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    EventKind,
    OutcomeStatus,
    Reason,
    RunState,
    StepState,
)
from pydantic import BaseModel

pytestmark = pytest.mark.every_storage

SECRET = "AKIAEXAMPLE0000000000"  # nobody's
NO_KEYS = {"kind": "regex", "config": {"patterns": ["AKIA[A-Z0-9]{16}"]}}
OUTPUT_GATE = {"name": "no-keys", "phase": "output", **NO_KEYS}
INPUT_GATE = {"name": "no-keys-in", "phase": "input", **NO_KEYS}


class NoConfig(BaseModel):
    """Nothing to configure."""


def stub(behaviour: Any) -> type[Any]:
    """An evaluator kind that answers as `behaviour` does, and notes what it was shown."""

    class Stub:
        kind = "stub"
        config_schema = NoConfig
        shown: ClassVar[list[Any]] = []

        def __init__(self, config: NoConfig) -> None:
            self.config = config

        async def evaluate(self, proposal: Any, facts: Any) -> EvaluatorResult:
            return EvaluatorResult(allow=True)

        async def examine(self, examined: Any) -> Any:
            self.shown.append(examined)
            answer = behaviour(examined)
            return await answer if asyncio.iscoroutine(answer) else answer

    return Stub


def repeats(examined: Any) -> None:
    raise RuntimeError(f"cannot read {examined.document}")


FAILURES = {
    "denies": (lambda _: EvaluatorResult(allow=False, reason="no", metadata={"rule": 7}), Reason.EVALUATOR_DENIED),
    "raises": (repeats, Reason.EVALUATOR_FAILED),
    "hangs": (lambda _: asyncio.sleep(600), Reason.EVALUATOR_FAILED),
    "answers nonsense": (lambda _: "yes", Reason.EVALUATOR_FAILED),
    "tells too much": (lambda _: EvaluatorResult(allow=True, metadata={"x": "y" * 5000}), Reason.EVALUATOR_FAILED),
}
ENDED_OTHERWISE = [each for each in OutcomeStatus if each not in (OutcomeStatus.SUCCEEDED, OutcomeStatus.NOT_STARTED)]
failures = pytest.mark.parametrize("failure", FAILURES)


def under(bench: Any, *evaluators: dict[str, Any], kinds: tuple[Any, ...] = (), **changes: Any) -> Any:
    """The bench under a policy with these evaluators."""
    policy = bench.with_policy(evaluators=list(evaluators), **changes).control_plane.policy if not kinds else None
    if policy is None:
        policy = type(bench.control_plane.policy).model_validate(
            {**bench.control_plane.policy.model_dump(mode="json"), "evaluators": list(evaluators), **changes}
        )
    plane = ControlPlane(
        policy=policy,
        registry=bench.control_plane.registry,
        storage=bench.storage,
        evaluators=EvaluatorRegistry([*BUILT_IN, *kinds]),
    )
    return replace(bench, control_plane=plane)


def failing(bench: Any, phase: str, failure: str) -> Any:
    gate = {"name": "odd", "kind": "stub", "phase": phase, "timeout_ms": 50}
    return under(bench, gate, kinds=(stub(FAILURES[failure][0]),))


def books(bench: Any) -> str:
    """Everything that is kept, of every tenant, as text."""
    if isinstance(bench.storage, MemoryStorage):
        tables = [each for each in vars(bench.storage.runs._books).values() if hasattr(each, "everything")]
        return "\n".join(repr(row) for table in tables for row in table.everything())
    names = bench.sql("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    rows = [bench.sql(f'SELECT t::text FROM "{name}" t') for (name,) in names]  # noqa: S608  # the database's own names
    return "\n".join(str(row) for table in rows for row in table)


async def tenant_events(bench: Any) -> list[Any]:
    return list(await bench.storage.events.read(bench.tenant, "tenant"))


async def step(bench: Any, lease: Any) -> Any:
    (found,) = await bench.storage.runs.steps(bench.tenant, lease.run.id)
    return found


class TestInput:
    """What a run is given."""

    async def test_a_denial_creates_nothing_and_is_on_record(self, bench):
        gated = under(bench, INPUT_GATE)
        given = {"question": "what is this?", "note": f"key {SECRET}"}
        with pytest.raises(InputRefused, match=r"no run is created: evaluator no-keys-in denies: .* pattern 1") as e:
            await gated.run(input=given, idempotency_key="k1")
        assert (e.value.reason, e.value.evaluator, e.value.rule) == (
            "evaluator_denied",
            "no-keys-in",
            "evaluators.no-keys-in",
        )
        assert e.value.unblock
        assert await bench.storage.runs.list(bench.tenant, limit=9, before=None, state=None) == []
        (event,) = await tenant_events(bench)
        assert (event.kind, event.actor) == (EventKind.RUN_REFUSED, bench.requester.actor)
        assert event.data["evaluator"] == "no-keys-in"
        assert event.data["reason"] == "evaluator_denied"
        assert event.data["input_digest"] == content_hash(given)
        assert event.data["agent"] == {"name": "test"}
        assert event.data["policy_digest"] == gated.control_plane.policy.digest
        assert [each["status"] for each in event.data["evaluations"]] == ["denied"]
        assert SECRET not in books(bench)
        assert all(each.consistent for each in await bench.control_plane.verify_events(bench.tenant))

    @failures
    async def test_whatever_an_evaluator_does_but_allow_refuses(self, bench, failure):
        gated = failing(bench, "input", failure)
        with pytest.raises(InputRefused) as refused:
            await gated.run(input={"x": 1})
        assert refused.value.reason == FAILURES[failure][1].value
        assert await bench.storage.runs.list(bench.tenant, limit=9, before=None, state=None) == []
        assert [event.kind for event in await tenant_events(bench)] == ["run_refused"]

    async def test_what_is_allowed_is_created_with_what_was_said(self, bench):
        kind = stub(lambda _: EvaluatorResult(allow=True, reason="fine", metadata={"score": 3}))
        gated = under(bench, INPUT_GATE, {"name": "odd", "kind": "stub", "phase": "input"}, kinds=(kind,))
        run = await gated.run(input={"x": 1})
        (event,) = await bench.storage.events.read(bench.tenant, run_stream(run.id))
        assert event.data["evaluations"] == [
            {"name": "no-keys-in", "status": "allowed", "reason": ""},
            {"name": "odd", "status": "allowed", "reason": "fine", "metadata": {"score": 3}},
        ]
        (shown,) = kind.shown
        assert shown.document == {
            "agent": "test",
            "input": {"x": 1},
            "principal": {
                "user_id": str(bench.requester.user_id),
                "actor_kind": "human",
                "scopes": sorted(bench.requester.scopes),
            },
        }

    async def test_without_such_evaluators_the_event_is_as_it_was(self, bench):
        run = await under(bench, OUTPUT_GATE).run()
        (event,) = await bench.storage.events.read(bench.tenant, run_stream(run.id))
        assert sorted(event.data) == ["agent", "budget", "policy_digest", "trace_id"]

    async def test_the_same_request_again_answers_the_run_it_made_and_another_one_does_not(self, bench):
        made = await bench.run(input={"key": SECRET}, idempotency_key="k", request_digest="d")
        gated = under(bench, INPUT_GATE)
        request = gated.request(input={"key": SECRET}, idempotency_key="k", request_digest="d")
        again, replayed = await gated.control_plane.create_run(request, principal=gated.requester)
        assert (again.id, replayed) == (made.id, True)
        assert await tenant_events(bench) == []
        with pytest.raises(IdempotencyConflict):
            await gated.run(input={"key": SECRET}, idempotency_key="k", request_digest="other")
        with pytest.raises(InputRefused):
            await gated.run(input={"key": SECRET}, idempotency_key="k2", request_digest="d")
        await gated.run(input={}, idempotency_key="k2", request_digest="d")

    async def test_a_delegated_run_is_asked_about_as_well(self, bench):
        gated = under(bench, INPUT_GATE)
        parent = await gated.run()
        handed_on = Delegation(
            to=uuid.uuid4(),
            scopes=frozenset({"plm.runs.create"}),
            share=Decimal("0.5"),
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        with pytest.raises(InputRefused):
            await gated.control_plane.delegate(parent, handed_on, gated.request(input={"key": SECRET}))

    async def test_in_a_tenant_that_does_not_exist_nothing_is_recorded(self, bench):
        gated = under(bench, INPUT_GATE)
        with pytest.raises(NotFound):
            await gated.in_tenant(uuid.uuid4()).run(input={"key": SECRET})


class TestOutput:
    """What a call gave back."""

    @failures
    async def test_whatever_an_evaluator_does_but_allow_withholds_the_output_and_settles_the_call(self, bench, failure):
        gated = failing(bench, "output", failure)
        lease = await gated.lease()
        grant = await gated.begun(lease)
        output = {"key": SECRET, "rows": [1, 2]}
        settled = await gated.settle(grant, lease, output=output, usage={"thing": Decimal(3)})
        assert (settled.status, settled.spent["EUR"], settled.spent["calls"]) == (OutcomeStatus.SUCCEEDED, "0.03", "1")
        assert await gated.budget(lease.run, "run", BudgetUnit.EUR) == (Decimal("0.03"), Decimal(0))
        found = await step(gated, lease)
        reason = FAILURES[failure][1]
        assert (found.state, found.output) == (StepState.SUCCEEDED, None)
        assert found.error["category"] == OUTPUT_WITHHELD
        assert found.error["reason"] == reason.value
        assert found.error["rule"] == "evaluators.odd"
        told = settled.withheld
        assert told == withheld_of(found)
        assert (told.evaluator, told.reason, told.digest) == ("odd", reason, content_hash({"output": output}))
        assert told.metadata == ({"rule": 7} if failure == "denies" else {})
        event = (await bench.storage.events.read(bench.tenant, run_stream(lease.run.id)))[-1]
        assert (event.kind, event.data["status"], event.data["error"]) == ("step_settled", "succeeded", found.error)
        assert SECRET not in books(bench)
        assert await gated.state(lease.run) is RunState.RUNNING
        assert all(each.consistent for each in await bench.control_plane.verify_events(bench.tenant))

    @pytest.mark.parametrize("status", ENDED_OTHERWISE)
    async def test_an_error_is_withheld_as_an_output_is(self, bench, status):
        gated = under(bench, OUTPUT_GATE)
        lease = await gated.lease()
        error = {"category": "fatal", "message": f"cannot log in with {SECRET}"}
        settled = await gated.settle(await gated.begun(lease), lease, status=status, error=error)
        assert settled.withheld.digest == content_hash({"error": error})
        found = await step(gated, lease)
        assert (found.state.value, found.error["reason"]) == (status.value, "evaluator_denied")
        assert SECRET not in books(bench)

    async def test_a_call_that_was_stopped_by_a_halt_stays_one(self, bench):
        gated = under(bench, OUTPUT_GATE)
        lease = await gated.lease()
        error = {"category": "cancelled", "message": SECRET, "reason": "halted"}
        await gated.settle(await gated.begun(lease), lease, status=OutcomeStatus.CANCELLED, error=error)
        found = await step(gated, lease)
        assert (found.error["reason"], withheld_of(found).reason) == ("halted", Reason.EVALUATOR_DENIED)

    async def test_files_of_an_output_that_is_withheld_are_recorded_nowhere(self, bench):
        gated = under(bench, OUTPUT_GATE)
        lease = await gated.lease()
        file = ArtifactRecord(
            id=uuid.uuid4(),
            name=f"{SECRET}.txt",
            mime_type="text/plain",
            size_bytes=1,
            sha256="0" * 64,
            backend="local",
            storage_uri="local://x",
        )
        settled = await gated.settle(await gated.begun(lease), lease, output={"file": "x"}, artifacts=[file])
        assert settled.withheld is not None
        with pytest.raises(NotFound):
            await gated.storage.runs.artifact(gated.tenant, file.id)
        assert SECRET not in books(bench)

    async def test_what_is_allowed_is_kept_with_what_was_said(self, bench):
        kind = stub(lambda _: EvaluatorResult(allow=True, metadata={"score": 3}))
        gated = under(bench, OUTPUT_GATE, {"name": "odd", "kind": "stub", "phase": "output"}, kinds=(kind,))
        lease = await gated.lease()
        settled = await gated.settle(await gated.begun(lease), lease, output={"rows": 1})
        found = await step(gated, lease)
        assert (settled.withheld, found.output, found.error) == (None, {"rows": 1}, None)
        (shown,) = kind.shown
        assert (shown.phase, shown.document["output"], sorted(shown.document)) == (
            "output",
            {"rows": 1},
            ["capability", "output"],
        )
        assert re.search(r"score\W+3", books(bench)), "in its ledger rows"

    async def test_a_call_that_never_left_the_host_gave_nothing_back(self, bench):
        gated = failing(bench, "output", "denies")
        lease = await gated.lease()
        error = {"category": "plugin_missing", "message": "not here"}
        settled = await gated.settle(await gated.grant(lease), lease, status=OutcomeStatus.NOT_STARTED, error=error)
        assert settled.withheld is None
        assert (await step(gated, lease)).error == error

    async def test_capabilities_that_a_gate_is_not_about_are_left_alone(self, bench):
        gated = under(bench, {**OUTPUT_GATE, "capabilities": ["thing.fire"]})
        lease = await gated.lease()
        await gated.settle(await gated.begun(lease), lease, output=SECRET)
        assert (await step(gated, lease)).output == SECRET

    async def test_a_gate_is_about_unrestricted_capabilities_too(self, bench):
        gated = under(bench, OUTPUT_GATE, tiers={"thing.read": "unrestricted"})
        lease = await gated.lease()
        await gated.settle(await gated.begun(lease), lease, output=SECRET)
        assert (await step(gated, lease)).output is None

    async def test_settling_again_answers_what_was_said_first_whatever_is_said_now(self, bench):
        says = [False, True, True, False]
        kind = stub(lambda _: EvaluatorResult(allow=says.pop(0)))
        gated = under(bench, {"name": "odd", "kind": "stub", "phase": "output"}, kinds=(kind,))
        for first in (False, True):
            lease = await gated.lease()
            grant = await gated.begun(lease)
            once = await gated.settle(grant, lease, output={"a": 1})
            again = await gated.settle(grant, lease, output={"a": 1})
            assert ((once.withheld is None), once.replayed) == (first, False)
            assert again == replace(once, replayed=True)
            assert ((await step(gated, lease)).output is None) is not first
        says.append(True)
        with pytest.raises(IdempotencyConflict):
            await gated.settle(grant, lease, output={"a": 2})

    async def test_an_evaluator_that_changes_what_it_is_shown_hides_nothing_and_changes_no_record(self, bench):
        def hides(examined):
            examined.document["output"].clear()
            return EvaluatorResult(allow=True)

        hiding = {"name": "a-hiding", "kind": "stub", "phase": "output"}
        gated = under(bench, hiding, OUTPUT_GATE, kinds=(stub(hides),))
        outputs: tuple[dict[str, Any], ...] = ({"key": SECRET}, {"key": "none", "n": [1, {"a": 0.5}]})
        for output in outputs:
            lease = await gated.lease()
            grant = await gated.begun(lease)
            once = await gated.settle(grant, lease, output=output)
            assert (once.withheld is None) is ("n" in output)
            recorded = await step(gated, lease)
            assert recorded.output == (output if once.withheld is None else None)
            assert output["key"] in (SECRET, "none"), "what its caller has is as it was"
            assert (await gated.settle(grant, lease, output=output)).replayed

    async def test_a_run_is_given_what_was_asked_about_whoever_changes_it_meanwhile(self, bench):
        given = {"note": "fine"}

        def changes(examined):
            examined.document["input"]["note"] = "changed by the evaluator"
            given["note"] = SECRET
            return EvaluatorResult(allow=True)

        gated = under(bench, {"name": "one", "kind": "stub", "phase": "input"}, kinds=(stub(changes),))
        run = await gated.run(input=given)
        assert run.input == {"note": "fine"}

    async def test_an_input_that_is_no_json_is_refused_by_its_place(self, bench):
        gated = under(bench, INPUT_GATE)
        with pytest.raises(InvalidRequest) as caught:
            await gated.run(input={"a": [1, {2}]})
        assert caught.value.field == "input.a[1]"

    @pytest.mark.postgres_only
    async def test_settling_again_in_a_transaction_of_the_callers_answers_what_was_said_first(self, bench):
        says = [False, True, True, False]
        kind = stub(lambda _: EvaluatorResult(allow=says.pop(0)))
        gated = under(bench, {"name": "odd", "kind": "stub", "phase": "output"}, kinds=(kind,))
        for first in (False, True):
            lease = await gated.lease()
            grant = await gated.begun(lease)
            async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
                once = await gated.settle(grant, lease, output={"a": 1}, connection=connection)
            async with await psycopg.AsyncConnection.connect(bench.database.app) as connection:
                again = await gated.settle(grant, lease, output={"a": 1}, connection=connection)
            assert ((once.withheld is None), again.replayed) == (first, True)
            assert again == replace(once, replayed=True)

    async def test_while_the_policy_cannot_be_loaded_everything_is_withheld_and_settled(self, bench):
        lease = await bench.lease()
        grant = await bench.begun(lease)
        bench.control_plane.in_force.withdraw("it is of a later release")
        settled = await bench.settle(grant, lease, output={"key": SECRET})
        found = await step(bench, lease)
        assert (settled.withheld.reason, settled.withheld.evaluator) == (Reason.POLICY_MISSING, "")
        assert (found.state, found.output, found.error["reason"]) == (StepState.SUCCEEDED, None, "policy_missing")
        assert SECRET not in books(bench)

    async def test_the_policy_that_decides_now_counts_and_not_the_one_that_decided_the_call(self, bench):
        lease = await bench.lease()
        first, gated = await bench.begun(lease), under(bench, OUTPUT_GATE)
        bench.control_plane.in_force.install(gated.control_plane.policy)
        assert (await bench.settle(first, lease, output=SECRET)).withheld.evaluator == "no-keys"
        bench.control_plane.in_force.install(bench.with_policy().control_plane.policy)
        other = await bench.lease()
        assert (await bench.settle(await bench.begun(other), other, output=SECRET)).withheld is None

    async def test_an_outcome_that_is_no_json_is_refused_before_anybody_is_asked(self, bench):
        kind = stub(lambda _: EvaluatorResult(allow=True))
        gated = under(bench, {"name": "odd", "kind": "stub", "phase": "output"}, kinds=(kind,))
        lease = await gated.lease()
        grant = await gated.begun(lease)
        with pytest.raises(InvalidRequest, match="output"):
            await gated.settle(grant, lease, output={"x": object()})
        assert kind.shown == []

    async def test_what_gave_back_no_json_is_withheld_where_somebody_would_be_asked(self, bench):
        for plane, withheld in ((bench, False), (under(bench, OUTPUT_GATE), True)):
            lease = await plane.lease()
            grant = await plane.begun(lease)
            settled = await plane.control_plane.settle(
                grant,
                Outcome(status=OutcomeStatus.SUCCEEDED),
                capability=plane.control_plane.capability("thing.read"),
                fencing_token=lease.fencing_token,
                trace_id=lease.run.trace_id,
                actor="test",
                opaque=True,
            )
            assert (settled.withheld is not None) is withheld
            assert ((await step(plane, lease)).error is not None) is withheld

    async def test_a_reply_that_was_lost_is_settled_again_as_it_was_recorded(self, bench, monkeypatch):
        says = [False, True]
        kind = stub(lambda _: EvaluatorResult(allow=says.pop(0)))
        gated = under(bench, {"name": "odd", "kind": "stub", "phase": "output"}, kinds=(kind,))
        lease = await gated.lease()
        grant = await gated.begun(lease)
        settle = gated.storage.admission.settle

        async def lost(*arguments, **keywords):
            await settle(*arguments, **keywords)
            raise StorageUnavailable("the reply was lost")

        with monkeypatch.context() as patched:
            patched.setattr(gated.storage.admission, "settle", lost)
            with pytest.raises(StorageUnavailable):
                await gated.settle(grant, lease, output=SECRET)
        assert (await gated.settle(grant, lease, output=SECRET)).withheld is not None
        assert SECRET not in books(bench)

    async def test_why_says_who_withheld_it(self, bench):
        gated = under(bench, OUTPUT_GATE)
        lease = await gated.lease()
        await gated.settle(await gated.begun(lease), lease, output=SECRET)
        told = await gated.control_plane.why(gated.tenant, f"{lease.run.id}/0/1")
        assert (told.state, told.reason, told.stage, told.rule) == (
            "succeeded",
            "evaluator_denied",
            "output",
            "evaluators.no-keys",
        )
        assert "was withheld: evaluator no-keys denies" in told.message
        assert told.unblocked_by.startswith("nothing: the call was made")

    async def test_a_policy_with_these_evaluators_is_activated_and_read_back(self, bench):
        gated = under(bench, OUTPUT_GATE, INPUT_GATE)
        policy = gated.control_plane.policy
        by = replace(bench.approver, scopes=bench.approver.scopes | {"plm.policy.activate"})
        await gated.control_plane.activate_policy(bench.tenant, policy, previous=None, reason="x", by=by)
        await bench.control_plane.keeper.refresh()
        assert bench.control_plane.policy == policy
        assert (await bench.storage.policies.standing()).digests == (policy.digest, None)
        with pytest.raises(InputRefused):
            await bench.run(input={"key": SECRET})


async def test_metadata_stands_with_the_decision_of_a_call(bench):
    kind = stub(lambda _: None)

    async def evaluate(self: Any, proposal: Any, facts: Any) -> EvaluatorResult:
        return EvaluatorResult(allow=True, metadata={"model": "small", "scores": [0.5, None, True]})

    kind.evaluate = evaluate
    gated = under(bench, {"name": "odd", "kind": "stub"}, kinds=(kind,))
    lease = await gated.lease()
    await gated.grant(lease)
    (told,) = (await step(gated, lease)).decision["facts"]["evaluations"]
    assert told == {
        "name": "odd",
        "status": "allowed",
        "reason": "",
        "metadata": {"model": "small", "scores": [0.5, None, True]},
    }
