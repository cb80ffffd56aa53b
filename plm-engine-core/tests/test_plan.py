"""Plan files: what they may say, and what an agent that follows one proposes."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.agent_runtime import Finish, History, Plan, PlanAgent, Propose, load_plan
from plm_engine_core.agent_runtime.plan import resolve
from plm_engine_core.control_plane import Principal
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.runs import Run, Step
from plm_engine_core.control_plane.vocabulary import RunKind, RunState, StepState

NOW = datetime(2020, 1, 1, tzinfo=UTC)

PLAN = """
agent: review
version: "1"
inputs:
  file: {type: file}
steps:
  - id: read
    capability: thing.read
    arguments: {file: {ref: inputs.file}}
  - id: write
    capability: thing.write
    resource: list
    arguments: {first: {ref: steps.read.output.items.0.name}, all: [{ref: steps.read.output}]}
result: {name: {ref: steps.write.output}}
"""


def load(folder: Path, text: str) -> Plan:
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return load_plan(path)


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("ref: inputs.file", "ref: inputs.other", "plan", "step 'read' refers to 'inputs.other'; only inputs.<name>"),
        ("ref: inputs.file", "ref: steps.write.output", "plan", "step 'read' refers to 'steps.write.output'"),
        ("ref: inputs.file", "ref: steps.read.output", "plan", "step 'read' refers to 'steps.read.output'"),
        ("ref: steps.read.output.items.0.name", "ref: steps.read.error", "plan", "'steps.read.error'"),
        ("ref: steps.write.output", "ref: nothing", "plan", "result refers to 'nothing'"),
        ("id: write", "id: read", "plan", "step 'read' stands twice"),
        ("resource: list", "resources: list", "steps.1.resources", "Extra inputs"),
        ("resource: list", "resource: list\n    resource: x", "plan", "'resource' twice"),
        ("capability: thing.read", "", "steps.0", "names a capability, or says what to ask"),
        ("id: write", "id: Write", "steps.1.id", "pattern"),
        ("type: file", "type: folder", "inputs.file.type", "given: 'folder'"),
        ("resource: list", "arguments: {on: 2020-01-01}\n    resource: list", "plan", "'arguments' twice"),
        ("{file: {ref: inputs.file}}", "{day: !!timestamp 2020-01-01}", "plan", "the tag !!timestamp is not read"),
        ("{file: {ref: inputs.file}}", "{x: .nan}", "plan", r"'\.nan' is no number that can be kept"),
        ("steps:", "steps: [", "plan", "not YAML"),
    ],
)
def test_a_bad_plan_is_refused_with_the_place_of_its_error(tmp_path, old, new, field, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        load(tmp_path, PLAN.replace(old, new))
    assert caught.value.field == field
    assert "plan.yaml" in str(caught.value)


def test_a_plan_keeps_its_digest_through_storage(tmp_path):
    plan = load(tmp_path, PLAN)
    stored = json.loads(json.dumps(plan.to_json()))
    assert Plan.model_validate(stored["plan"]).digest == stored["digest"] == plan.digest
    assert plan.digest != load(tmp_path, PLAN.replace("resource: list", "resource: other")).digest


def history(run_input, *steps) -> History:
    run = Run(
        tenant_id=uuid.UUID(int=1),
        id=uuid.UUID(int=2),
        kind=RunKind.HOSTED,
        state=RunState.RUNNING,
        agent={},
        input=run_input,
        principal=Principal(user_id=uuid.UUID(int=3), actor_kind="human", scopes=frozenset()),
        policy_digest="",
        trace_id="",
        root_span_id="",
        fencing_token=1,
        cancel_requested=False,
        created_at=NOW,
        updated_at=NOW,
    )
    return History(run=run, steps=steps)


def step(step_id, state=StepState.SUCCEEDED, output=None, error=None, index=0) -> Step:
    return Step(
        step_index=index,
        attempt=1,
        step_id=step_id,
        step_key="k",
        capability="c.d",
        resource="r",
        arguments={},
        state=state,
        decision={},
        output=output,
        error=error,
        created_at=NOW,
    )


def test_steps_are_proposed_in_order_with_earlier_values_in_place(tmp_path):
    agent = PlanAgent(load(tmp_path, PLAN))
    given_input = {"file": {"artifact": "a"}}
    first = agent.next(history(given_input))
    assert first == Propose(
        step_id="read", capability="thing.read", resource="thing.read", arguments={"file": {"artifact": "a"}}
    )
    output = {"items": [{"name": "one"}]}
    second = agent.next(history(given_input, step("read", output=output)))
    assert (second.resource, second.arguments) == ("list", {"first": "one", "all": [output]})
    end = agent.next(history(given_input, step("read", output=output), step("write", output=7, index=1)))
    assert end == Finish(succeeded=True, result={"name": 7})


@pytest.mark.parametrize(
    ("attempt", "reason", "message"),
    [
        (step("read", StepState.FAILED, error={"category": "fatal", "message": "no"}), "fatal", "step read: no"),
        (
            step("read", StepState.DENIED, error={"reason": "missing_scopes", "message": "no scope"}),
            "missing_scopes",
            "step read: no scope",
        ),
        (step("read", StepState.CANCELLED), "cancelled", "step read: "),
        (
            step("read", output={"items": []}),
            "reference_missing",
            "step write: 'steps.read.output.items.0.name' leads nowhere: there is no '0'",
        ),
    ],
    ids=["failed", "denied", "cancelled", "reference"],
)
def test_what_cannot_go_on_ends_the_run_with_its_reason(tmp_path, attempt, reason, message):
    end = PlanAgent(load(tmp_path, PLAN)).next(history({"file": 1}, attempt))
    assert (end.succeeded, end.reason, end.message) == (False, reason, message)


def test_a_missing_input_or_result_ends_the_run_with_its_path(tmp_path):
    agent = PlanAgent(load(tmp_path, PLAN.replace("steps.write.output}", "steps.write.output.gone}")))
    assert agent.next(history({})).message == "step read: 'inputs.file' leads nowhere: there is no 'file'"
    done = agent.next(history({"file": 1}, step("read", output={"items": [{"name": 1}]}), step("write", output={})))
    assert done.message == "result: 'steps.write.output.gone' leads nowhere: there is no 'gone'"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def has_reference(value) -> bool:
    if isinstance(value, dict):
        return (value.keys() == {"ref"} and isinstance(value["ref"], str)) or any(map(has_reference, value.values()))
    return isinstance(value, list) and any(map(has_reference, value))


@given(json_values.filter(lambda value: not has_reference(value)), json_values)
def test_what_holds_no_reference_stays_as_it_is(value, values):
    assert resolve(value, {"x": values}) == value


@given(json_values, json_values)
def test_a_value_put_in_place_is_not_read_as_a_reference_again(inner, other):
    planted = {"ref": "x", "value": inner}
    values = {"x": {"ref": "secret"}, "y": planted, "secret": other}
    assert resolve({"a": {"ref": "x"}, "b": [{"ref": "y"}]}, values) == {"a": {"ref": "secret"}, "b": [planted]}


@given(st.text(max_size=20), json_values)
def test_any_path_leads_to_a_value_or_to_a_message_that_names_it(path, values):
    try:
        resolve({"ref": path}, {"x": values})
    except LookupError as error:
        message = error.args[0]
    else:
        return
    assert repr(path) in message


@given(json_values, st.data())
def test_every_place_in_a_value_can_be_reached(value, data):
    path, found = "x", value
    while isinstance(found, dict | list) and found:
        keys = sorted(found) if isinstance(found, dict) else range(len(found))
        key = data.draw(st.sampled_from(list(keys)))
        if "." in str(key):
            return
        path, found = f"{path}.{key}", found[key]
    assert resolve({"ref": path}, {"x": value}) == found
