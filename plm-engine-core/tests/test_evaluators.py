"""Evaluators: what each kind allows, and that nothing but their allowing allows, whatever they do."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
from plm_engine_core.control_plane import ControlPlane
from plm_engine_core.control_plane.admission.evaluators import (
    BUILT_IN,
    EVALUATORS_GROUP,
    Configured,
    EvaluatorRegistry,
    EvaluatorResult,
    ParallelPolicyEvaluator,
)
from plm_engine_core.control_plane.admission.evaluators import registry as registry_module
from plm_engine_core.control_plane.admission.evaluators.parallel import MOST_THREADS
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.matching import LONGEST_TEXT
from plm_engine_core.control_plane.policy import Facts
from plm_engine_core.control_plane.policy.snapshot import read_policy
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import AutonomyLevel, CapabilityMode, EvaluationStatus, Reason
from pydantic import BaseModel

ALLOW = EvaluatorResult(allow=True)
DENY = EvaluatorResult(allow=False, reason="no")


@dataclass(frozen=True)
class Proposed:
    """One proposal."""

    capability: str = "mail.send"
    resource: str = "box/1"
    arguments: Mapping[str, Any] = field(default_factory=dict)


FACTS = Facts(
    capability=CapabilityDescriptor(id="mail.send", description="x", mode=CapabilityMode.READ, plugin="mail"),
    principal_scopes=frozenset({"mail.use"}),
    requester=uuid.UUID(int=1),
    autonomy=AutonomyLevel.L2,
    rate_allowed=True,
    agent="reviewer",
)


class NoConfig(BaseModel):
    """Nothing to configure."""


class Stub:
    """Answers as it was told."""

    kind: ClassVar[str] = "stub"
    config_schema: ClassVar[type[BaseModel]] = NoConfig

    def __init__(self, answer):
        self.answer = answer
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def evaluate(self, proposal, facts):
        self.asked.set()
        if isinstance(self.answer, BaseException):
            raise self.answer
        if isinstance(self.answer, asyncio.Event):
            try:
                await self.answer.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return ALLOW
        return self.answer


class Computing(Stub):
    """The same as a plain function."""

    def evaluate(self, proposal, facts):
        if isinstance(self.answer, BaseException):
            raise self.answer
        if isinstance(self.answer, threading.Event):
            self.answer.wait(10)
            return ALLOW
        return self.answer


async def ask(*evaluators, gate=True, seconds=5.0):
    names = [f"e{index}" for index in range(len(evaluators))]
    parallel = ParallelPolicyEvaluator(
        [
            Configured(name=name, evaluator=each, gate=gate, timeout_seconds=seconds)
            for name, each in zip(names, evaluators, strict=True)
        ]
    )
    return await parallel.evaluate_all(names, Proposed(), FACTS)


@pytest.mark.parametrize("kind", [Stub, Computing])
@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (ALLOW, "allowed", ""),
        (DENY, "denied", "no"),
        (ValueError("broken"), "failed", "broken"),
        (True, "invalid", "it answered with bool"),
        (None, "invalid", "it answered with NoneType"),
        ({"allow": True}, "invalid", "it answered with dict"),
        (EvaluatorResult(allow="yes"), "invalid", "it answered with EvaluatorResult"),
        (EvaluatorResult(allow=False, reason="\x00\ud800" + "x" * 1000), "denied", "\\x00\\ud800x"),
    ],
    ids=range(8),
)
async def test_only_a_result_that_allows_allows(kind, answer, status, reason):
    (evaluation,) = await ask(kind(answer))
    assert evaluation.status is EvaluationStatus(status)
    assert reason in evaluation.reason
    assert len(evaluation.reason) < 600
    json.dumps(evaluation.to_json()).encode()


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize("kind", [Stub, Computing])
@pytest.mark.parametrize("answer", [SystemExit(3), Unprintable(), EvaluatorResult(allow=False, reason=Unprintable())])
def test_one_that_would_end_the_process_or_cannot_be_printed_denies(kind, answer):
    (evaluation,) = asyncio.run(ask(kind(answer)))
    assert evaluation.status in (EvaluationStatus.FAILED, EvaluationStatus.DENIED)
    assert evaluation.reason


async def test_answers_come_in_declared_order_whoever_is_first():
    slow, fast = asyncio.Event(), Stub(ALLOW)
    asyncio.get_running_loop().call_soon(slow.set)
    answers = await ask(Stub(slow), fast, Computing(ALLOW))
    assert [(each.name, each.allows) for each in answers] == [("e0", True), ("e1", True), ("e2", True)]


@pytest.mark.parametrize("refuser", [Stub(DENY), Stub(ValueError("x")), Stub(None), Computing(DENY)])
async def test_the_first_gate_that_does_not_allow_answers_at_once_and_the_others_are_cancelled(refuser):
    waiting = Stub(asyncio.Event())
    first, second = await ask(waiting, refuser, seconds=60)
    assert first.status is EvaluationStatus.CANCELLED
    assert second.status is not EvaluationStatus.ALLOWED
    await asyncio.wait_for(waiting.cancelled.wait(), 5)


async def test_a_denial_of_what_is_no_gate_leaves_the_others_asked():
    late = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, late.set)
    answers = await ask(Stub(DENY), Stub(late), gate=False)
    assert [each.allows for each in answers] == [False, True]


async def test_one_that_gives_no_answer_in_its_time_is_cancelled_and_denies():
    hanging = Stub(asyncio.Event())
    (evaluation,) = await ask(hanging, seconds=0.02)
    assert (evaluation.status, evaluation.reason) == (EvaluationStatus.TIMED_OUT, "no answer within 0.02 s")
    await asyncio.wait_for(hanging.cancelled.wait(), 5)


async def test_one_that_will_not_be_cancelled_holds_nobody_up():
    class Stubborn(Stub):
        async def evaluate(self, proposal, facts):
            while not self.answer.is_set():
                try:
                    await self.answer.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
            return ALLOW

    end = asyncio.Event()
    stubborn = Stubborn(end)
    (evaluation,) = await ask(stubborn, seconds=0.02)
    assert evaluation.status is EvaluationStatus.TIMED_OUT
    await asyncio.wait_for(stubborn.cancelled.wait(), 5)
    end.set()


async def test_one_that_computes_leaves_the_event_loop_free_and_is_left_behind_in_time():
    release = threading.Event()
    computing = asyncio.create_task(ask(Computing(release), seconds=0.05))
    ticks = 0
    while not computing.done():
        await asyncio.sleep(0.001)
        ticks += 1
    release.set()
    (evaluation,) = await computing
    assert evaluation.status is EvaluationStatus.TIMED_OUT
    assert ticks > 3


async def test_who_stops_waiting_stops_the_evaluators():
    waiting = Stub(asyncio.Event())
    task = asyncio.create_task(ask(waiting))
    await asyncio.wait_for(waiting.asked.wait(), 5)
    task.cancel()
    await asyncio.wait_for(waiting.cancelled.wait(), 5)
    with pytest.raises(asyncio.CancelledError):
        await task


def test_more_of_them_than_there_are_threads_serve_one_event_loop_after_the_other():
    many = [
        Configured(name=f"e{index}", evaluator=Computing(ALLOW), gate=True, timeout_seconds=60)
        for index in range(MOST_THREADS + 8)
    ]
    parallel = ParallelPolicyEvaluator(many)
    names = [each.name for each in many]
    for _ in range(3):
        assert {each.reason for each in asyncio.run(parallel.evaluate_all(names, Proposed(), FACTS))} == {""}


def test_one_that_was_left_behind_by_a_denial_ends_later_without_a_word(caplog):
    """As at the terminal, where the event loop ends with the answer."""
    release = threading.Event()
    before = set(threading.enumerate())
    _, denied = asyncio.run(ask(Computing(release), Stub(DENY)))
    assert denied.status is EvaluationStatus.DENIED
    (left,) = set(threading.enumerate()) - before
    release.set()
    left.join(10)
    assert not left.is_alive()
    assert not caplog.records


async def test_an_evaluator_that_is_not_configured_denies():
    parallel = ParallelPolicyEvaluator([])
    (evaluation,) = await parallel.evaluate_all(["gone"], Proposed(), FACTS)
    assert evaluation.status is EvaluationStatus.FAILED


# --- the kinds -------------------------------------------------------------------------------------------------------


async def answer_of(make_policy, kind, config, **proposal):
    policy = make_policy(evaluators=[{"name": "one", "kind": kind, "config": config}])
    parallel = EvaluatorRegistry().build(policy)
    (evaluation,) = await parallel.evaluate_all(["one"], Proposed(**proposal), FACTS)
    assert evaluation.status in (EvaluationStatus.ALLOWED, EvaluationStatus.DENIED), evaluation
    return evaluation.allows, evaluation.reason


SECRETS = {"patterns": ["AKIA[0-9]{4}", "[0-9]{8}"], "field": "arguments"}
FORM = {"patterns": ["^[a-z]+$"], "field": "arguments.name", "deny_on_match": False}


@pytest.mark.parametrize(
    ("config", "arguments", "allows", "reason"),
    [
        (SECRETS, {}, True, ""),
        (SECRETS, {"a": {"b": ["x", "my akia1234"]}}, False, "arguments matches pattern 1"),
        (SECRETS, {"akia1234": 1}, False, "arguments matches pattern 1"),
        (SECRETS, {"a": 123456789}, False, "arguments matches pattern 2"),
        (SECRETS, {"a": "x" * (LONGEST_TEXT + 1)}, False, "cannot be searched"),
        (SECRETS, {"a": list(range(10_000))}, False, "more than 10000 values"),
        (FORM, {"name": "abc"}, True, ""),
        (FORM, {"name": "abc1"}, False, "matches none"),
        (FORM, {"name": ["abc", "1"]}, False, "matches none"),
        (FORM, {}, False, "missing"),
        (FORM, {"name": None}, False, "no text"),
    ],
)
async def test_regex_finds_what_must_not_or_must_be_there(make_policy, config, arguments, allows, reason):
    found = await answer_of(make_policy, "regex", config, arguments=arguments)
    assert found[0] is allows
    assert reason in found[1]


TO = {"field": "arguments.to", "allowlist": ["Ann@Example.org", "bob@example.org"], "blocklist": ["bob@example.org"]}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"to": " ann@example.ORG "}, ""),
        ({"to": ["ann@example.org", "eve@example.org"]}, "not on the allowlist"),
        ({"to": "bob@example.org"}, "on the blocklist"),
        ({"to": None}, "missing or no text"),
        ({"to": {}}, "missing or no text"),
        ({}, "missing or no text"),
    ],
)
async def test_a_list_allows_what_stands_on_it(make_policy, arguments, reason):
    allows, why = await answer_of(make_policy, "list", TO, arguments=arguments)
    assert allows is (reason == "")
    assert reason in why


async def test_a_blocklist_alone_lets_everything_else_pass(make_policy):
    assert (await answer_of(make_policy, "list", {"blocklist": ["mail.drop"]}))[0] is True
    assert (await answer_of(make_policy, "list", {"blocklist": [" MAIL.send"]}))[0] is False


SCHEMA = {
    "type": "object",
    "required": ["amount"],
    "additionalProperties": False,
    "properties": {"amount": {"type": "integer", "maximum": 100}, "code": {"pattern": "^[A-Z]+$"}},
    "patternProperties": {"^x_": {"type": "string"}},
}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"amount": 100, "code": "AB", "x_1": "y"}, ""),
        ({"amount": 101}, "arguments.amount breaks 'maximum'"),
        ({"amount": 1, "code": "ab"}, "arguments.code breaks 'pattern'"),
        ({"amount": 1, "x_1": 1}, "arguments.* breaks 'type'"),
        ({"amount": 1, "secret": "s3cr3t"}, "arguments breaks 'additionalProperties'"),
        ({}, "arguments breaks 'required'"),
    ],
)
async def test_arguments_keep_to_their_schema_and_a_refusal_tells_no_value(make_policy, arguments, reason):
    allows, why = await answer_of(make_policy, "json_schema", {"schema": SCHEMA}, arguments=arguments)
    assert allows is (reason == "")
    assert reason in why
    assert "s3cr3t" not in why


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({"not": {"pattern": "drop table"}}, {"text": " " * 70_000 + "drop table"}),
        ({"not": {"pattern": "drop table"}}, {"text": "drop table\ud800"}),
        ({"if": {"pattern": "drop"}, "then": False}, {"text": " " * 70_000 + "drop table"}),
        ({"not": {"patternProperties": {"drop": False}}, "type": "object"}, {"text": {" " * 70_000: 1}}),
    ],
    ids=range(4),
)
async def test_a_text_that_a_pattern_cannot_be_tried_on_is_not_allowed_under_not_either(make_policy, schema, arguments):
    config = {"schema": {"properties": {"text": schema}}}
    allows, why = await answer_of(make_policy, "json_schema", config, arguments=arguments)
    assert not allows
    assert "cannot be tried" in why


@pytest.mark.parametrize(
    ("schema", "value", "allowed"),
    [
        ({"patternProperties": {r"^\d+$": {"type": "string"}}, "additionalProperties": False}, {"1": "x"}, True),
        ({"patternProperties": {r"^\d+$": {"type": "string"}}, "additionalProperties": False}, {"\u0661": 1}, False),
        ({"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}, {"a" * 60 + "!": 1}, False),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, {"a": 1, "b": "x"}, True),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, {"a": 1, "b": 1}, False),
        ({"additionalProperties": True}, {"b": 1}, True),
        ({"uniqueItems": True}, [1, True, "1", [1], [True], {"a": 1}, {"a": True}, None, 0, False], True),
        ({"uniqueItems": True}, [{"a": [1, {"b": 2}]}, {"a": [1.0, {"b": 2}]}], False),
        ({"uniqueItems": True}, [1, 1.0], False),
        ({"uniqueItems": False}, [1, 1], True),
    ],
    ids=range(10),
)
async def test_properties_and_items_are_told_apart_as_json_schema_says(make_policy, schema, value, allowed):
    """Patterns are RE2's in every keyword: one that another engine took for a match would go unchecked."""
    config = {"schema": {"properties": {"value": schema}}}
    allows, why = await answer_of(make_policy, "json_schema", config, arguments={"value": value})
    assert allows is allowed, why


@pytest.mark.parametrize(
    "schema",
    [{"additionalProperties": {"type": "string"}}, {"patternProperties": {"^s3": {"type": "string"}}}],
    ids=["additional", "pattern"],
)
async def test_a_name_that_the_schema_does_not_have_is_not_told_either(make_policy, schema):
    config = {"schema": {"properties": {"by_key": schema}}}
    allows, why = await answer_of(make_policy, "json_schema", config, arguments={"by_key": {"s3cr3t": 1}})
    assert (allows, why) == (False, "arguments.by_key.* breaks 'type' of its schema")


CEDAR = """
permit(principal, action == Action::"mail.send", resource) when {
  principal.scopes.contains("mail.use") && context.arguments.amount < 100
};
forbid(principal, action, resource == Resource::"box/\\"2\\"");
"""


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        ({"arguments": {"amount": 5, "none": None, "part": 0.5}}, ""),
        ({"arguments": {"amount": 500}}, "not permitted"),
        ({"arguments": {"amount": 5}, "resource": 'box/"2"'}, "forbidden by policy1"),
        ({"arguments": {"amount": 5}, "capability": "mail.drop"}, "not permitted"),
        ({"arguments": {}}, "Cedar: "),
        ({"arguments": {"amount": "5"}}, "Cedar: "),
    ],
)
async def test_cedar_permits_and_what_it_cannot_evaluate_denies(make_policy, proposal, reason):
    allows, why = await answer_of(make_policy, "cedar", {"policies": CEDAR}, **proposal)
    assert allows is (reason == "")
    assert reason in why


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("nothing", {}, "evaluators.one: no evaluator of kind nothing is installed; there are cedar, json_schema"),
        ("regex", {"patterns": ["("]}, "evaluators.one.config: .* no RE2 pattern"),
        ("regex", {"patterns": ["a"], "field": "argument.x"}, "evaluators.one.config.field: .* starts with none of"),
        ("regex", {"pattern": ["a"]}, "evaluators.one.config.patterns: Field required"),
        ("list", {}, "evaluators.one.config: give an allowlist or a blocklist"),
        ("json_schema", {"schema": {"type": "thing"}}, "the schema is none"),
        ("json_schema", {"schema": {"properties": {"a": {"pattern": r"(a)\1"}}}}, "no RE2 pattern"),
        ("json_schema", {"schema": {"patternProperties": {"(?=a)": {}}}}, "no RE2 pattern"),
        ("json_schema", {"schema": {"properties": {"enum": {"pattern": "(?=a)"}}}}, "no RE2 pattern"),
        ("json_schema", {"schema": {"$ref": "http://127.0.0.1:1/x"}}, "http://127.0.0.1:1/x.*nothing is fetched"),
        ("json_schema", {"schema": {"items": {"$ref": "#/$defs/gone"}}}, r"'#/\$defs/gone', which is not in it"),
        ("json_schema", {"schema": {"x": {"pattern": "(?=a)"}, "$ref": "#/x"}}, "no RE2 pattern"),
        (
            "json_schema",
            {"schema": {"allOf": [{"patternProperties": {"a": {}}}], "unevaluatedProperties": False}},
            "unevaluatedProperties beside patternProperties",
        ),
        ("cedar", {"policies": "permit("}, "the Cedar policies cannot be read"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_when_it_is_read(make_policy, kind, config, message):
    policy = make_policy(evaluators=[{"name": "one", "kind": kind, "config": config}])
    with pytest.raises(InvalidRequest, match=message):
        EvaluatorRegistry().build(policy)


async def test_references_within_a_schema_and_to_its_own_draft_are_followed(make_policy):
    schema = {
        "$defs": {
            "count": {"$id": "urn:count", "$defs": {"whole": {"type": "integer"}}, "$ref": "#/$defs/whole"},
            "tree": {"$anchor": "tree", "properties": {"below": {"$ref": "#tree"}, "n": {"$ref": "urn:count"}}},
        },
        "properties": {
            "tree": {"$ref": "#tree"},
            "schema": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
            "$ref": {"type": "string"},
        },
    }
    good = {"tree": {"below": {"n": 1}}, "schema": {"type": "string"}, "$ref": "x"}
    assert await answer_of(make_policy, "json_schema", {"schema": schema}, arguments=good) == (True, "")
    for bad in ({"tree": {"below": {"n": "1"}}}, {"schema": {"type": "thing"}}, {"$ref": 1}):
        allows, _ = await answer_of(make_policy, "json_schema", {"schema": schema}, arguments=bad)
        assert not allows


def entry(name, value):
    return EntryPoint(name=name, value=value, group=EVALUATORS_GROUP)


def test_nobody_changes_a_policy_once_it_is_read_not_even_within_an_evaluators_configuration(make_policy):
    patterns, schema = ["secret"], {"properties": {"a": {"type": "string"}}}
    policy = make_policy(
        evaluators=[
            {"name": "one", "kind": "regex", "config": {"patterns": patterns, "field": "arguments"}},
            {"name": "two", "kind": "json_schema", "config": {"schema": schema}},
        ]
    )
    patterns.append("more")  # by who gave it
    schema["properties"].clear()
    one, two = (spec.config for spec in policy.evaluators)
    with pytest.raises(AttributeError):
        one["patterns"].append("more")
    with pytest.raises(TypeError):
        two["schema"]["properties"]["a"] = {}
    said = json.loads(policy.content)["evaluators"]
    assert [each["config"] for each in said] == [
        {"patterns": ["secret"], "field": "arguments"},
        {"schema": {"properties": {"a": {"type": "string"}}}},
    ]
    assert read_policy(policy.content, source="it").digest == policy.digest
    EvaluatorRegistry().build(policy)


def test_a_configuration_that_is_nested_too_deeply_is_refused(make_policy):
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"not": deep}
    with pytest.raises(ValueError, match="more than 100 deep"):
        make_policy(evaluators=[{"name": "one", "kind": "json_schema", "config": {"schema": deep}}])


def test_installed_packages_add_kinds_and_one_that_fails_prevents_the_start(monkeypatch):
    found = [entry("stub", f"{__name__}:Stub")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found if group == EVALUATORS_GROUP else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: Stub if self.name == "stub" else 1 / 0)
    assert EvaluatorRegistry.installed().kinds == ("cedar", "json_schema", "list", "regex", "stub")
    for odd in ("odd", NoConfig, type("Odd", (), {"kind": "odd"})):
        monkeypatch.setattr(EntryPoint, "load", lambda _, odd=odd: odd)
        with pytest.raises(InvalidRequest, match=r"stub .* cannot be loaded: TypeError: it is no evaluator class"):
            EvaluatorRegistry.installed()
    monkeypatch.setattr(EntryPoint, "load", lambda self: Stub if self.name == "stub" else 1 / 0)
    found.append(entry("broken", "gone:Thing"))
    with pytest.raises(InvalidRequest, match=r"broken \(gone:Thing\) cannot be loaded: ZeroDivisionError"):
        EvaluatorRegistry.installed()
    assert "stub" in EvaluatorRegistry.installed(optional=["broken"]).kinds
    with pytest.raises(InvalidRequest, match="two evaluators are of kind regex"):
        EvaluatorRegistry([*BUILT_IN, BUILT_IN[-1]])


# --- in admission ----------------------------------------------------------------------------------------------------

GATE = {"name": "names", "kind": "list", "config": {"field": "arguments.name", "allowlist": ["one"]}}


async def test_an_evaluator_decides_in_admission_and_its_answer_is_stored_with_the_decision(bench):
    strict = bench.with_policy(evaluators=[GATE])
    lease = await strict.lease()
    allowed = await strict.control_plane.admit(strict.proposal(lease))
    assert allowed.grant
    denied = await strict.control_plane.admit(strict.proposal(lease, step_index=1, arguments={"name": "two"}))
    assert denied.reason is Reason.EVALUATOR_DENIED
    assert "evaluator names denies: arguments.name is not on the allowlist" in denied.message
    first, second = await strict.storage.runs.steps(strict.tenant, lease.run.id)
    assert first.decision["facts"]["evaluations"] == [{"name": "names", "status": "allowed", "reason": ""}]
    assert second.decision["facts"]["evaluations"][0]["status"] == "denied"
    assert second.decision["rule"] == "evaluators.names"
    assert second.decision["unblock"] == "propose what the evaluator allows"


async def test_an_evaluator_that_breaks_denies_in_admission(bench, make_policy):
    class Broken(Stub):
        kind = "broken"

        def __init__(self, config):
            super().__init__(RuntimeError("out of order"))

    spec = {"name": "b", "kind": "broken"}
    plane = ControlPlane(
        policy=make_policy(evaluators=[spec]),
        registry=bench.control_plane.registry,
        storage=bench.storage,
        evaluators=EvaluatorRegistry([*BUILT_IN, Broken]),
    )
    denied = await plane.admit(bench.proposal(await bench.lease()))
    assert denied.reason is Reason.EVALUATOR_FAILED
    assert "RuntimeError: out of order" in denied.message
