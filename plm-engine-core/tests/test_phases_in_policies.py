"""What a policy may say of the phases of its evaluators, what each may look at, and what they may tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.admission.evaluators import (
    BUILT_IN,
    Configured,
    EvaluatorRegistry,
    EvaluatorResult,
    Examined,
    ParallelPolicyEvaluator,
)
from plm_engine_core.control_plane.admission.evaluators.values import kept_metadata
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import Evaluation, PolicySnapshot, load_policy, read_policy
from plm_engine_core.control_plane.vocabulary import EvaluationPhase, EvaluationStatus
from pydantic import BaseModel

HEAD = """\
version: "1"
tier_by_mode: {read: auto_approve, plan-write: auto_approve, execute-write: always_approve}
risk_by_mode: {read: low, plan-write: low, execute-write: high}
budgets: {run: {EUR: 1, calls: 1}, tenant: {EUR: 1, calls: 1}}
"""
KEYS = {"patterns": ["AKIA[A-Z0-9]{16}"]}
SECRET = "AKIAEXAMPLE0000000000"  # nobody's


def load(tmp_path: Path, text: str) -> PolicySnapshot:
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    return load_policy(path)


def policy_with(*evaluators: dict[str, Any]) -> PolicySnapshot:
    return PolicySnapshot.model_validate({**yaml.safe_load(HEAD), "evaluators": list(evaluators)})


REFUSED = {
    "in a rule": (
        """\
rules:
  - {id: a, then: deny}
  - id: b
    when: {type: not, condition: {type: evaluator, evaluator_name: out}}
    then: deny
evaluators: [{name: out, kind: regex, phase: output, config: {patterns: [x]}}]
""",
        ":8:5",
        "rules.b.when asks the evaluator out, which is for the phase output; conditions are about calls",
    ),
    "in auto-approval": (
        """\
evaluators: [{name: given, kind: regex, phase: input, config: {patterns: [x]}}]
auto_approve_when: {type: evaluator, evaluator_name: given}
""",
        ":6:1",
        "auto_approve_when asks the evaluator given, which is for the phase input",
    ),
    "no gate": (
        "evaluators:\n  - {name: a, kind: list}\n  - {name: b, kind: regex, phase: output, gate: false}\n",
        ":7:5",
        "evaluator b: gate: false goes with phase: call",
    ),
    "capabilities": (
        "evaluators: [{name: b, kind: regex, phase: input, capabilities: [a.b]}]\n",
        ":5:14",
        "evaluator b: capabilities goes with the phases call and output",
    ),
    "unknown": ("evaluators: [{name: b, kind: regex, phase: after}]\n", ":5:37", "'input', 'call' or 'output'"),
}


@pytest.mark.parametrize(("text", "place", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_its_place(tmp_path: Path, text: str, place: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(tmp_path, text)
    assert f"policy.yaml{place}: " in str(refused.value)
    assert words in str(refused.value)


def test_the_phase_of_calls_says_nothing_and_changes_no_digest() -> None:
    gate = {"name": "a", "kind": "regex", "config": KEYS}
    said, unsaid = policy_with({**gate, "phase": "call"}), policy_with(gate)
    assert said.digest == unsaid.digest
    assert "phase" not in said.content
    assert said.digest == "6ce90d92d2c550940aa3ea7693b246b4bf02fc1eaeacea4de7ff3a9c35d56852"
    other = policy_with(gate, {**gate, "name": "b", "phase": "output"})
    assert [each.get("phase") for each in json.loads(other.content)["evaluators"]] == [None, "output"]
    assert read_policy(other.content, source="x") == other
    assert other.digest != unsaid.digest


@pytest.mark.parametrize("phase", ["input", "output"])
def test_a_kind_that_is_only_asked_about_calls_is_refused_in_another_phase(phase: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"evaluators\.c: evaluators of kind cedar .*not in the phase {phase}"):
        EvaluatorRegistry().build(policy_with({"name": "c", "kind": "cedar", "phase": phase, "config": {}}))


@pytest.mark.parametrize(
    ("phase", "path", "known"),
    [
        ("call", "output.key", "agent, arguments, autonomy, capability, claims, principal, resource"),
        ("call", "input", "agent, arguments, autonomy, capability, claims, principal, resource"),
        ("input", "arguments.x", "agent, input, principal"),
        ("output", "resource", "artifacts, capability, error, output"),
    ],
)
@pytest.mark.parametrize("kind", ["regex", "list", "json_schema"])
def test_a_field_of_another_phase_is_refused(kind: str, phase: str, path: str, known: str) -> None:
    own: dict[str, Any] = {"regex": KEYS, "list": {"blocklist": ["x"]}, "json_schema": {"schema": {}}}[kind]
    spec = {"name": "a", "kind": kind, "phase": phase, "config": {**own, "field": path}}
    with pytest.raises(InvalidRequest, match=rf"evaluators\.a\.config\.field.*starts with none of {known}"):
        EvaluatorRegistry().build(policy_with(spec))


def asked(config: Mapping[str, Any], kind: str, phase: str, document: Mapping[str, Any]) -> Evaluation:
    spec = {"name": "a", "kind": kind, "phase": phase, "config": dict(config)}
    evaluators = EvaluatorRegistry().build(policy_with(spec))
    examined = Examined(phase=EvaluationPhase(phase), document=document)
    (evaluation,) = asyncio.run(evaluators.examine_all(["a"], examined))
    return evaluation


NUMBERS = {"schema": {"type": "object", "properties": {"n": {"type": "integer"}}}}
FAILED = {"error": {"category": "fatal", "message": SECRET}}


@pytest.mark.parametrize(
    ("kind", "config", "phase", "document", "allowed"),
    [
        ("regex", KEYS, "input", {"input": {"a": [SECRET]}, "agent": "x"}, False),
        ("regex", KEYS, "input", {"input": {"a": 1}, "agent": SECRET}, True),
        ("regex", KEYS, "output", {"output": {"a": {SECRET: 1}}}, False),
        ("regex", KEYS, "output", {"output": "fine"}, True),
        ("regex", KEYS, "output", FAILED, False),
        ("regex", KEYS, "output", {"output": None, "artifacts": [{"name": SECRET}]}, False),
        ("regex", {**KEYS, "field": "output.a"}, "output", {"output": {"a": SECRET}}, False),
        ("regex", {**KEYS, "field": "output.b"}, "output", {"output": {"a": SECRET}}, True),
        ("regex", {**KEYS, "field": "output.a"}, "output", FAILED, True),
        ("regex", {**KEYS, "field": "error.message"}, "output", FAILED, False),
        ("json_schema", NUMBERS, "input", {"input": {"n": "1"}}, False),
        ("json_schema", NUMBERS, "input", {"input": {"n": 1}}, True),
        ("json_schema", NUMBERS, "output", {"output": {"n": "1"}}, False),
        ("json_schema", NUMBERS, "output", {"output": None}, False),
        ("json_schema", NUMBERS, "output", FAILED, True),
        ("list", {"blocklist": ["secret"], "field": "output.class"}, "output", {"output": {"class": "Secret"}}, False),
        ("list", {"allowlist": ["open"], "field": "output.class"}, "output", {"output": {}}, False),
        ("list", {"allowlist": ["open"], "field": "output.class"}, "output", {"output": {"class": "open"}}, True),
        ("list", {"allowlist": ["open"], "field": "output.class"}, "output", FAILED, True),
        ("list", {"allowlist": ["bot"], "field": "agent"}, "input", {"input": {}, "agent": "bot"}, True),
        ("list", {"allowlist": ["bot"], "field": "agent"}, "input", {"input": {}, "agent": "other"}, False),
    ],
)
def test_what_the_kinds_look_at(
    kind: str, config: dict[str, Any], phase: str, document: dict[str, Any], allowed: bool
) -> None:
    evaluation = asked(config, kind, phase, document)
    assert evaluation.status is (EvaluationStatus.ALLOWED if allowed else EvaluationStatus.DENIED)
    assert SECRET not in evaluation.reason


def test_every_kind_but_cedar_may_be_asked_in_every_phase() -> None:
    assert [each.kind for each in BUILT_IN if not hasattr(each, "examine")] == ["cedar"]


class NoConfig(BaseModel):
    """Nothing to configure."""


class Told:
    """Answers with this."""

    kind: ClassVar[str] = "told"
    config_schema: ClassVar[type[BaseModel]] = NoConfig

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def evaluate(self, proposal: Any, facts: Any) -> Any:
        return self.answer

    def examine(self, examined: Examined) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def told(answer: Any) -> Evaluation:
    """How an answer is taken, by either way of asking."""
    evaluators = ParallelPolicyEvaluator([Configured(name="a", evaluator=Told(answer), gate=True, timeout_seconds=60)])
    examined = Examined(phase=EvaluationPhase.OUTPUT, document={"output": 1})
    nothing: Any = None

    async def both() -> tuple[Any, Any]:
        return await evaluators.evaluate_all(["a"], nothing, nothing), await evaluators.examine_all(["a"], examined)

    (one,), (two,) = asyncio.run(both())
    assert one == two
    return one


class Hostile(dict[str, Any]):
    """Does what it likes when somebody looks."""

    def items(self) -> Any:
        raise RuntimeError("gotcha")


class Liar(EvaluatorResult):
    """Cannot even be asked."""

    def __getattribute__(self, name: str) -> Any:
        if name == "metadata":
            raise RuntimeError(SECRET)
        return super().__getattribute__(name)


def deep(levels: int) -> Any:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


HOSTILE: dict[str, Any] = {
    "a text": "text",
    "a list": [1],
    "none": None,
    "a mapping of its own": Hostile(a=1),
    "one within": {"a": Hostile()},
    "a number as name": {1: "a"},
    "an object": {"a": object()},
    "a tuple": {"a": (1, 2)},
    "a set": {"a": {1}},
    "a decimal": {"a": Decimal(1)},
    "bytes": {"a": b"x"},
    "nan": {"a": float("nan")},
    "nul": {"a": "\0"},
    "half a pair": {"a": "\ud800"},
    "a large number": {"a": 2**65},
    "a huge number": {"a": 10**100_000},
    "a long text": {"a": "x" * 4001},
    "many values": {"a": ["x"] * 2000},
    "many bytes": {"a": "é" * 2100},
    "many names": {str(number): number for number in range(1000)},
    "deep": deep(9),
    "very deep": deep(3000),
}


@pytest.mark.parametrize("metadata", HOSTILE.values(), ids=HOSTILE)
def test_metadata_that_is_no_small_json_object_is_no_answer(metadata: Any) -> None:
    evaluation = told(EvaluatorResult(allow=True, metadata=metadata))
    assert (evaluation.status, evaluation.metadata) == (EvaluationStatus.INVALID, {})
    assert "metadata" in evaluation.reason


def test_an_answer_that_cannot_be_read_is_none() -> None:
    evaluation = told(Liar(allow=True))
    assert evaluation.status is EvaluationStatus.INVALID
    assert SECRET not in evaluation.reason


def test_metadata_is_kept_apart_from_the_evaluators_own() -> None:
    own: dict[str, Any] = {"scores": [1, 0.5, None, True, "a"], "at": {"most": {}}}
    evaluation = told(EvaluatorResult(allow=False, reason="no", metadata=own))
    assert (evaluation.status, evaluation.metadata) == (EvaluationStatus.DENIED, own)
    own["scores"].append("more")
    assert len(evaluation.metadata["scores"]) == 5
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    before = {"name": "a", "status": "denied", "reason": "no"}
    assert Evaluation.from_json(before).to_json() == before


small = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=5), small, max_size=5))
def test_what_is_kept_is_what_was_told_and_small(metadata: dict[str, Any]) -> None:
    try:
        kept = kept_metadata(metadata)
    except ValueError:
        return
    assert kept == metadata
    assert len(json.dumps(kept, ensure_ascii=False, separators=(",", ":")).encode()) <= 4000


def test_of_an_evaluator_that_raises_over_an_output_only_the_kind_of_error_is_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluator = Configured(name="a", evaluator=Told(ValueError(SECRET)), gate=True, timeout_seconds=60)
    examined = Examined(phase=EvaluationPhase.OUTPUT, document={"output": SECRET})
    (evaluation,) = asyncio.run(ParallelPolicyEvaluator([evaluator]).examine_all(["a"], examined))
    assert (evaluation.status, evaluation.reason) == (EvaluationStatus.FAILED, "ValueError")
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text
