"""Allows or denies by a list of values."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from plm_engine_core.control_plane.admission.evaluators.evaluator import EvaluatorResult, Examined
from plm_engine_core.control_plane.admission.evaluators.values import Found, LooksAt, check_field
from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.fields import MISSING, FieldPath


class ListConfig(BaseModel):
    """Values are compared trimmed and case-folded; `blocklist` wins, a given `allowlist` denies everything else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    allowlist: tuple[str, ...] = ()
    blocklist: tuple[str, ...] = ()
    field: FieldPath = "capability.id"

    _path_known = field_validator("field")(check_field)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.allowlist and not self.blocklist:
            raise ValueError("give an allowlist or a blocklist; without either it would allow everything")
        return self


class ListEvaluator:
    """Kind `list`."""

    kind: ClassVar[str] = "list"
    config_schema: ClassVar[type[BaseModel]] = ListConfig

    def __init__(self, config: ListConfig) -> None:
        self._field = LooksAt(config)
        self._allowed = frozenset(map(_folded, config.allowlist))
        self._blocked = frozenset(map(_folded, config.blocklist))

    async def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult:
        """Look the value up; each one, where the field is a list of them."""
        return self._looked_up(self._field.of_call(proposal, facts))

    async def examine(self, examined: Examined) -> EvaluatorResult:
        """The same for another phase."""
        return self._looked_up(self._field.of(examined))

    def _looked_up(self, found: Found | None) -> EvaluatorResult:
        if found is None:
            return EvaluatorResult(allow=True)
        value = found.value
        for each in value if isinstance(value, list | tuple) else [value]:
            refusal = self._refusal(each)
            if refusal:
                return EvaluatorResult(allow=False, reason=f"{found.name} {refusal}")
        return EvaluatorResult(allow=True)

    def _refusal(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return "is missing or no text" if self._allowed or value is not MISSING else ""
        text = _folded(str(value))
        if text in self._blocked:
            return "is on the blocklist"
        return "is not on the allowlist" if self._allowed and text not in self._allowed else ""


def _folded(text: str) -> str:
    return text.strip().casefold()
