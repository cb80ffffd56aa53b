"""Checks the arguments of a call, or any field, against a JSON Schema (draft 2020-12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from plm_engine_core.control_plane.admission.evaluators.evaluator import EvaluatorResult, Examined
from plm_engine_core.control_plane.admission.evaluators.values import Found, LooksAt, check_field
from plm_engine_core.control_plane.json_schemas import first_problem, schema_validator
from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.fields import MISSING, FieldPath


class JsonSchemaConfig(BaseModel):
    """The schema must hold for `field`. References stay within the schema; nothing is fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    json_schema: Mapping[str, Any] = Field(alias="schema")
    field: FieldPath = "arguments"

    _path_known = field_validator("field")(check_field)


class JsonSchemaEvaluator:
    """Kind `json_schema`; `pattern` is matched in linear time, as everything here is."""

    kind: ClassVar[str] = "json_schema"
    config_schema: ClassVar[type[BaseModel]] = JsonSchemaConfig

    def __init__(self, config: JsonSchemaConfig) -> None:
        self._field = LooksAt(config)
        self._validator = schema_validator(dict(config.json_schema))

    def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult:
        """Name the first entry that breaks the schema, without its value."""
        return self._checked(self._field.of_call(proposal, facts))

    def examine(self, examined: Examined) -> EvaluatorResult:
        """The same for another phase."""
        return self._checked(self._field.of(examined))

    def _checked(self, found: Found | None) -> EvaluatorResult:
        if found is None:
            return EvaluatorResult(allow=True)
        if found.value is MISSING:
            return EvaluatorResult(allow=False, reason=f"{found.name} is missing")
        problem = first_problem(self._validator, found.value, root=found.name)
        return EvaluatorResult(allow=True) if problem is None else EvaluatorResult(allow=False, reason=problem)
