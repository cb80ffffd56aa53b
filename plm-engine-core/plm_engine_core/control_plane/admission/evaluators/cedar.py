"""Asks Cedar policies; needs `plm-engine-core[cedar]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from plm_engine_core.control_plane.admission.evaluators.evaluator import EvaluatorResult
from plm_engine_core.control_plane.admission.evaluators.values import seen_by_paths
from plm_engine_core.control_plane.policy import Facts, Proposed


class CedarConfig(BaseModel):
    """Cedar policies over `User::"<user id>"`, `Action::"<capability>"` and `Resource::"<resource>"`.

    The principal has the attributes `actor_kind` and `scopes`; the context holds `arguments`, `agent`, `autonomy`,
    `capability` and `claims`. Cedar has neither null nor fractions: null is left out, a fraction is a text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policies: str = Field(min_length=1)


class CedarEvaluator:
    """Kind `cedar`."""

    kind: ClassVar[str] = "cedar"
    config_schema: ClassVar[type[BaseModel]] = CedarConfig

    def __init__(self, config: CedarConfig) -> None:
        try:
            import cedarpy
        except ImportError as error:
            raise ValueError("Cedar is not installed; install plm-engine-core[cedar]") from error
        self._cedar = cedarpy
        try:
            self._policies = cedarpy.PolicySet.from_str(config.policies)
        except ValueError as error:
            raise ValueError(f"the Cedar policies cannot be read: {error}") from error

    def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult:
        """Allow what Cedar permits; a Cedar policy that could not be evaluated denies, Cedar itself would skip it."""
        document = seen_by_paths(proposal, facts)
        principal = document.pop("principal")
        who = {"type": "User", "id": principal.pop("user_id")}
        request = {
            "principal": who,
            "action": {"type": "Action", "id": proposal.capability},
            "resource": {"type": "Resource", "id": document.pop("resource")},
            "context": _cedar_value(document),
        }
        answer = self._cedar.is_authorized(request, self._policies, [{"uid": who, "attrs": principal, "parents": []}])
        if answer.diagnostics.errors:
            return EvaluatorResult(allow=False, reason=f"Cedar: {answer.diagnostics.errors[0]}")
        named = ", ".join(answer.diagnostics.reasons)
        return EvaluatorResult(
            allow=answer.allowed, reason="" if answer.allowed else f"forbidden by {named}" if named else "not permitted"
        )


def _cedar_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _cedar_value(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_cedar_value(each) for each in value if each is not None]
    return str(value) if isinstance(value, float) else value
