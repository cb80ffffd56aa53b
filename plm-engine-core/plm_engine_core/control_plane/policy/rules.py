"""Rules and evaluators as a policy declares them. A rule only narrows: it denies, steers, asks, or raises the risk."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plm_engine_core.control_plane.documents import Flag, Whole
from plm_engine_core.control_plane.policy.conditions import ConditionTree, EvaluatorSays, RiskLevelIs, leaves
from plm_engine_core.control_plane.policy.frozen import Document
from plm_engine_core.control_plane.vocabulary import EvaluationPhase, RiskLevel

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=80)]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class Effect(StrEnum):
    """What a rule that applies does; the strictest one wins."""

    DENY = "deny"
    STEER = "steer"  # refuse with guidance
    ASK = "ask"  # a human approves
    RAISE_RISK = "raise_risk"  # to at least `risk`


class Rule(BaseModel):
    """One rule: for capabilities that match, when its condition holds or is undecided, then this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    capabilities: Globs = ("*",)
    when: ConditionTree | None = None
    then: Effect
    guidance: str = ""
    risk: RiskLevel | None = None
    reason: str = Field(default="", max_length=500)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.then is Effect.STEER) != bool(self.guidance):
            raise ValueError(f"rule {self.id}: guidance goes with then: steer, and only with it")
        if (self.then is Effect.RAISE_RISK) != (self.risk is not None):
            raise ValueError(f"rule {self.id}: risk goes with then: raise_risk, and only with it")
        if self.then is Effect.RAISE_RISK and self.when is not None:
            late = [leaf.type for leaf in leaves(self.when) if isinstance(leaf, EvaluatorSays | RiskLevelIs)]
            if late:
                raise ValueError(f"rule {self.id}: the risk is rated before {late[0]} is known; use then: ask or deny")
        return self


class EvaluatorSpec(BaseModel):
    """One evaluator: a registered kind with its configuration, under a name of its own.

    In the phase `call` a `gate` must allow every proposal of its capabilities; others are asked only where a condition
    names them. In the phases `input` and `output` every evaluator is a gate: it must allow what each run is given, or
    what each call of its capabilities gave back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    kind: Name
    config: Document = Field(default_factory=lambda: MappingProxyType({}))
    capabilities: Globs = ("*",)
    gate: Flag = True
    timeout_ms: Whole = Field(default=1000, gt=0, le=60_000)
    phase: EvaluationPhase = EvaluationPhase.CALL

    @model_validator(mode="after")
    def _fits_its_phase(self) -> Self:
        if self.phase is EvaluationPhase.CALL:
            return self
        if not self.gate:
            raise ValueError(
                f"evaluator {self.name}: gate: false goes with phase: call; no condition asks about {self.phase}"
            )
        if self.phase is EvaluationPhase.INPUT and self.capabilities != ("*",):
            raise ValueError(
                f"evaluator {self.name}: capabilities goes with the phases call and output; which ones a run will use "
                "is not known when it is created"
            )
        return self
