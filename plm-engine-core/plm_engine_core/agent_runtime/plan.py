"""PlanAgent: an agent whose whole behaviour is a plan from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from plm_shared.canonical_json import storable_json
from plm_shared.idempotency import compute_content_hash
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from plm_engine_core.agent_runtime.agent import AskInput, Finish, History, Propose, refusal
from plm_engine_core.control_plane.admission.withheld import OUTPUT_WITHHELD, Withheld
from plm_engine_core.control_plane.documents import load_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.hitl.inputs import check_ask
from plm_engine_core.control_plane.vocabulary import StepState

_INDEX = re.compile("[0-9]{1,9}")
_IDENTIFIER = r"^[a-z][a-z0-9_]*$"


def _json(value: Any) -> Any:
    storable_json(value, root="value")
    return value


Json = Annotated[Any, AfterValidator(_json)]
"""A JSON value. YAML has more than that (dates, .nan), which is refused with its path."""


class PlanInput(BaseModel):
    """One input: a `file` arrives as an artifact reference, anything else as its JSON value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["file", "string", "integer", "number", "boolean", "object", "array"]
    description: str = ""
    default: Json = None


class PlanAsk(BaseModel):
    """A question to a human, and the JSON Schema of the wanted answer, which becomes the output of the step."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    question: str
    json_schema: Annotated[dict[str, Any], AfterValidator(_json)] = Field(default_factory=dict, alias="schema")

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        try:
            check_ask(self.question, self.json_schema)
        except InvalidRequest as error:
            raise ValueError(str(error)) from None
        return self


class PlanStep(BaseModel):
    """One step: a capability with arguments, or an ask; `{ref: a.b.c}` in arguments stands for an earlier value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=_IDENTIFIER)
    capability: str = ""
    resource: str = ""
    arguments: Annotated[dict[str, Any], AfterValidator(_json)] = Field(default_factory=dict)
    ask: PlanAsk | None = None

    @model_validator(mode="after")
    def _calls_or_asks(self) -> Self:
        if self.ask is None and "capability" not in self.model_fields_set:
            raise ValueError("a step names a capability, or says what to ask")
        if self.ask is not None and (self.capability or self.resource or self.arguments):
            raise ValueError("a step that asks has no capability, resource or arguments")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, serialized: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A step that asks nothing has no word of it, so that its plan keeps its digest."""
        said: dict[str, Any] = serialized(self)
        asked = said.pop("ask")
        return (
            said if asked is None else {**said, "ask": {"question": asked["question"], "schema": asked["json_schema"]}}
        )


class Plan(BaseModel):
    """A named list of steps. References reach only inputs and the outputs of earlier steps, checked when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    agent: str = Field(min_length=1, max_length=120)
    version: str = Field(min_length=1)
    description: str = ""
    inputs: dict[str, PlanInput] = Field(default_factory=dict)
    steps: tuple[PlanStep, ...] = Field(min_length=1, max_length=1000)
    result: Json = None

    @model_validator(mode="after")
    def _references_reach_back(self) -> Self:
        known: set[str] = set()
        for step in self.steps:
            if step.id in known:
                raise ValueError(f"step {step.id!r} stands twice")
            for path in _references(step.arguments):
                self._check(path, known, f"step {step.id!r}")
            known.add(step.id)
        for path in _references(self.result):
            self._check(path, known, "result")
        return self

    def _check(self, path: str, known: set[str], where: str) -> None:
        head, _, rest = path.partition(".")
        name = rest.split(".")[0]
        if head == "inputs" and name in self.inputs:
            return
        if head == "steps" and name in known and rest.split(".")[1:2] == ["output"]:
            return
        raise ValueError(f"{where} refers to {path!r}; only inputs.<name> and steps.<earlier step>.output exist there")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical content, lower-case hex."""
        return compute_content_hash(self.model_dump(mode="json"))

    def to_json(self) -> dict[str, Any]:
        """What a run stores of its agent."""
        return {
            "name": self.agent,
            "version": self.version,
            "digest": self.digest,
            "plan": self.model_dump(mode="json"),
        }


def load_plan(path: Path) -> Plan:
    """Read a plan from YAML.

    Raises:
        InvalidRequest: naming the file and the entry that is missing, unknown, doubled or wrong.
    """
    return load_document(path, Plan, "plan")


class PlanAgent:
    """Walks its plan step by step; the first refusal or failure ends the run with its reason.

    A step that succeeded and whose output was withheld is done, and not made again. What refers to that output ends the
    run, with the reason `output_withheld`.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def next(self, history: History) -> Propose | AskInput | Finish:
        """The first step that has not succeeded, or the end."""
        values = {
            "inputs": history.run.input,
            "steps": {step_id: {"output": output} for step_id, output in history.outputs().items()},
        }
        withheld = history.withheld()
        for step in self._plan.steps:
            attempt = history.latest(step.id)
            if attempt is not None and attempt.state is StepState.SUCCEEDED:
                continue
            if attempt is not None:
                reason, message = refusal(attempt)
                return Finish(succeeded=False, reason=reason, message=f"step {step.id}: {message}")
            if step.ask is not None:
                return AskInput(step_id=step.id, question=step.ask.question, schema=step.ask.json_schema)
            if lacking := _lacking(step.arguments, withheld):
                return Finish(succeeded=False, reason=OUTPUT_WITHHELD, message=f"step {step.id}: {lacking}")
            try:
                arguments = resolve(step.arguments, values)
            except LookupError as error:
                return Finish(succeeded=False, reason="reference_missing", message=f"step {step.id}: {error.args[0]}")
            return Propose(
                step_id=step.id,
                capability=step.capability,
                resource=step.resource or step.capability,
                arguments=arguments,
            )
        if lacking := _lacking(self._plan.result, withheld):
            return Finish(succeeded=False, reason=OUTPUT_WITHHELD, message=f"result: {lacking}")
        try:
            return Finish(succeeded=True, result=resolve(self._plan.result, values))
        except LookupError as error:
            return Finish(succeeded=False, reason="reference_missing", message=f"result: {error.args[0]}")


def _lacking(value: Any, withheld: Mapping[str, Withheld]) -> str:
    """The first reference of a value that leads to what was withheld, in words; nothing where none does."""
    for path in _references(value) if withheld else ():
        head, _, rest = path.partition(".")
        told = withheld.get(rest.partition(".")[0]) if head == "steps" else None
        if told is not None:
            return f"{path!r} is not there: {told.message}"
    return ""


def resolve(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with every `{ref: path}` replaced by what the path leads to.

    Raises:
        LookupError: the path leads nowhere; the message names it.
    """
    if _is_reference(value):
        return _follow(value["ref"], values)
    if isinstance(value, dict):
        return {key: resolve(each, values) for key, each in value.items()}
    if isinstance(value, list):
        return [resolve(each, values) for each in value]
    return value


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"ref"} and isinstance(value["ref"], str)


def _follow(path: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in path.split("."):
        if isinstance(found, list) and _INDEX.fullmatch(part) and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping) and part in found:
            found = found[part]
        else:
            raise LookupError(f"{path!r} leads nowhere: there is no {part!r}")
    return found


def _references(value: Any) -> list[str]:
    if _is_reference(value):
        return [value["ref"]]
    if isinstance(value, dict):
        return [path for each in value.values() for path in _references(each)]
    if isinstance(value, list):
        return [path for each in value for path in _references(each)]
    return []
