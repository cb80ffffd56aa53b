"""The policy in force, as an immutable, content-addressed value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self
from uuid import UUID

from plm_shared.canonical_json import canonical_json
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.documents import Number, load_document, parse_document
from plm_engine_core.control_plane.limits.budgets import BudgetPlan, Limit, SubjectZone, Unit
from plm_engine_core.control_plane.limits.rate_limit import Bucket, Dimension
from plm_engine_core.control_plane.limits.windows import ZoneName
from plm_engine_core.control_plane.policy.approval import ApprovalRule
from plm_engine_core.control_plane.policy.conditions import Condition, ConditionTree, EvaluatorSays, leaves
from plm_engine_core.control_plane.policy.frozen import Table
from plm_engine_core.control_plane.policy.models import ModelRule
from plm_engine_core.control_plane.policy.plan import Plans
from plm_engine_core.control_plane.policy.rules import EvaluatorSpec, Rule
from plm_engine_core.control_plane.policy.run_risk import RunRisk
from plm_engine_core.control_plane.vocabulary import (
    TOKENS,
    ActionTier,
    AutonomyLevel,
    BudgetUnit,
    CapabilityMode,
    EvaluationPhase,
    RiskLevel,
)

ADDED = frozenset(
    {
        "auto_approve_when",
        "autonomy_ceiling_by_capability",
        "evaluators",
        "limits",
        "models",
        "rate_limit_per_agent",
        "risk_by_capability",
        "risk_floor",
        "rules",
        "run_risk",
        "teams",
        "time_zone",
        "time_zones",
        "units",
    }
)
"""Members that the first form did not have: while they say nothing the digest leaves them out, and stays as it was."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RateLimit(_Frozen):
    """A token bucket: `per_second` tokens are added each second, up to `burst`."""

    per_second: Number = Field(default=30.0, gt=0, allow_inf_nan=False)
    burst: Number = Field(default=30.0, ge=1, allow_inf_nan=False)


class BudgetDefaults(_Frozen):
    """Limits for a run that asks for none, and for a tenant without its own; amounts per unit."""

    run: Table[Unit, Amount]
    tenant: Table[Unit, Amount]

    @field_validator("run", "tenant")
    @classmethod
    def _every_unit(cls, limits: Mapping[str, Decimal]) -> Mapping[str, Decimal]:
        missing = [unit.value for unit in BudgetUnit if unit not in limits]
        if missing:
            raise ValueError(f"a limit is missing for {', '.join(missing)}; a unit without a limit cannot be spent")
        return limits


def _by_capability(written: Any) -> Any:
    """Tiers as lists of capabilities, turned into one entry a capability; the other form is left as it is.

    Raises:
        ValueError: a capability stands in two lists.
    """
    names = {tier.value for tier in ActionTier}
    if not isinstance(written, Mapping) or not written or not all(key in names for key in written):
        return written
    tiers: dict[Any, Any] = {}
    for tier, capabilities in written.items():
        if not isinstance(capabilities, list | tuple):
            raise ValueError(f"{tier} needs a list of capabilities")  # noqa: TRY004  # pydantic reports ValueError
        for capability in capabilities:
            if not isinstance(capability, str):
                raise ValueError(f"{tier} needs a list of capabilities, and {capability!r:.40} is no name of one")  # noqa: TRY004
            if capability in tiers:
                raise ValueError(f"{capability} is both {tiers[capability]} and {tier}; keep one of the two")
            tiers[capability] = tier
    return tiers


_TIER = {"enum": [tier.value for tier in ActionTier]}
Tiers = Annotated[
    Table[str, ActionTier],
    BeforeValidator(_by_capability),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "object", "additionalProperties": _TIER},
                {
                    "type": "object",
                    "propertyNames": _TIER,
                    "additionalProperties": {"type": "array", "items": {"type": "string"}},
                },
            ],
            "description": "capability: tier, or tier: [capabilities]",
        }
    ),
]


class PolicySnapshot(_Frozen):
    """What may run, how, and with whose consent. Equal content has an equal `digest`."""

    version: str = Field(min_length=1)
    tiers: Tiers = Field(default_factory=lambda: MappingProxyType({}), validate_default=False)
    tier_by_mode: Table[CapabilityMode, ActionTier]
    guidance: Table[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=lambda: MappingProxyType({}))
    auto_approve_max_risk: RiskLevel = RiskLevel.LOW
    auto_approve_when: ConditionTree | None = None
    risk_by_mode: Table[CapabilityMode, RiskLevel]
    risk_by_capability: Table[str, RiskLevel] = Field(default_factory=lambda: MappingProxyType({}))
    risk_floor: Table[CapabilityMode, RiskLevel] = Field(default_factory=lambda: MappingProxyType({}))
    run_risk: RunRisk | None = None
    rules: tuple[Rule, ...] = ()
    evaluators: tuple[EvaluatorSpec, ...] = ()
    autonomy_ceiling: AutonomyLevel = AutonomyLevel.L2
    autonomy_ceiling_by_capability: Table[str, AutonomyLevel] = Field(default_factory=lambda: MappingProxyType({}))
    rate_limit: RateLimit = RateLimit()
    rate_limit_per_agent: RateLimit | None = None
    approval: ApprovalRule = Field(default_factory=ApprovalRule)
    budgets: BudgetDefaults
    units: tuple[Unit, ...] = ()
    limits: tuple[Limit, ...] = ()
    time_zone: ZoneName | None = None
    time_zones: tuple[SubjectZone, ...] = ()
    teams: Table[str, tuple[UUID, ...]] = Field(default_factory=lambda: MappingProxyType({}))
    models: ModelRule | None = None
    max_eur_per_call: Amount | None = None
    grant_seconds: Number = Field(default=300.0, gt=0, le=86400)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, table in (("tier_by_mode", self.tier_by_mode), ("risk_by_mode", self.risk_by_mode)):
            missing = [mode.value for mode in CapabilityMode if mode not in table]
            if missing:
                raise _at((name,), f"{name} has no entry for {', '.join(missing)}")
        steering = [mode.value for mode, tier in self.tier_by_mode.items() if tier is ActionTier.STEER]
        if steering:
            words = "tier_by_mode cannot steer: guidance is given per capability, so steer it under tiers"
            raise _at(("tier_by_mode", steering[0]), words)
        unguided = [key for key, tier in self.tiers.items() if tier is ActionTier.STEER and key not in self.guidance]
        if unguided:
            words = f"guidance is missing for the steered capabilities {', '.join(sorted(unguided))}"
            raise _at(("tiers", unguided[0]), words)
        return self

    @model_validator(mode="after")
    def _named_once_and_known(self) -> Self:
        _once("rules", (rule.id for rule in self.rules))
        _once("evaluators", (spec.name for spec in self.evaluators))
        phases = {spec.name: spec.phase for spec in self.evaluators}
        for place, tree in self.conditions().items():
            for name in sorted(evaluators_in(tree)):
                if name not in phases:
                    words = f"{place} asks the evaluator {name}, which evaluators does not declare"
                    raise _at(self._location(place), words)
                if phases[name] is not EvaluationPhase.CALL:
                    words = (
                        f"{place} asks the evaluator {name}, which is for the phase {phases[name]}; conditions are "
                        "about calls, so declare one of phase call for them"
                    )
                    raise _at(self._location(place), words)
        return self

    def _location(self, place: str) -> tuple[int | str, ...]:
        """Where the condition at `place` stands in the document."""
        for index, rule in enumerate(self.rules):
            if place == f"rules.{rule.id}.when":
                return ("rules", index, "when")
        return (place,)

    @model_validator(mode="after")
    def _counted_in_known_units(self) -> Self:
        known = {*BudgetUnit, TOKENS, *self.units}
        _once("units", (*BudgetUnit, TOKENS, *self.units), before=len(BudgetUnit) + 1)
        _once("limits", (_shown(each) for each in self.limits))
        _once("time_zones", (".".join(each.key) for each in self.time_zones))
        _once("teams", (str(user) for members in self.teams.values() for user in members), before=None)
        used: list[tuple[tuple[int | str, ...], str, str]] = [
            *((("budgets", "run", unit), f"budgets.run.{unit}", unit) for unit in self.budgets.run),
            *((("budgets", "tenant", unit), f"budgets.tenant.{unit}", unit) for unit in self.budgets.tenant),
            *((("limits", index, "unit"), _shown(each), each.unit) for index, each in enumerate(self.limits)),
        ]
        for location, place, unit in used:
            if unit not in known:
                raise _at(location, f"{place} counts {unit}, which units does not register")
        return self

    def conditions(self) -> dict[str, Condition]:
        """Every condition of the policy by its place in it."""
        trees = {f"rules.{rule.id}.when": rule.when for rule in self.rules if rule.when is not None}
        return trees if self.auto_approve_when is None else {**trees, "auto_approve_when": self.auto_approve_when}

    @cached_property
    def content(self) -> str:
        """The canonical text, which says everything and nothing twice; `read_policy` reads it back."""
        unsaid: dict[str, Any] = {name: True for name in ADDED if not getattr(self, name)}
        exclude = {**unsaid, "approval": self.approval.unsaid()}
        by_default = {
            index: {"phase"} for index, spec in enumerate(self.evaluators) if spec.phase is EvaluationPhase.CALL
        }
        if by_default and "evaluators" not in unsaid:
            exclude["evaluators"] = by_default
        if self.models is not None:
            exclude["models"] = self.models.unsaid()
        return canonical_json(self.model_dump(mode="json", exclude=exclude))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical content, lower-case hex."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def plans(self) -> Plans:
        """The policy compiled, capability by capability."""
        return Plans(self)

    @cached_property
    def budget_plan(self) -> BudgetPlan:
        """Which budgets a call draws on."""
        return BudgetPlan(
            run=self.budgets.run,
            tenant=self.budgets.tenant,
            limits=self.limits,
            time_zone=self.time_zone,
            time_zones=self.time_zones,
        )

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """What a proposal takes a token of each of, from narrow to wide."""
        rates = {Dimension.AGENT: self.rate_limit_per_agent, Dimension.TENANT: self.rate_limit}
        return tuple(
            Bucket(dimension=dimension, per_second=rate.per_second, burst=rate.burst)
            for dimension, rate in rates.items()
            if rate is not None
        )

    @cached_property
    def _team_of(self) -> Mapping[UUID, str]:
        return {user: team for team, members in self.teams.items() for user in members}

    def team_of(self, user_id: UUID) -> str | None:
        """The team that a user belongs to, or None."""
        return self._team_of.get(user_id)

    def tier_of(self, capability_id: str, mode: CapabilityMode) -> ActionTier:
        """The tier a capability falls in: its own, else that of its mode."""
        return self.tiers.get(capability_id, self.tier_by_mode[mode])


def _at(location: tuple[int | str, ...], message: str) -> ValidationError:
    """What a check of the whole policy finds in one place of it, so that readers of a file are led there."""
    words = message.replace("{", "{{").replace("}", "}}")
    problem = InitErrorDetails(type=PydanticCustomError("value_error", words), loc=location, input={})
    return ValidationError.from_exception_data("policy", [problem])


def evaluators_in(tree: Condition) -> frozenset[str]:
    """The evaluators that a condition asks."""
    return frozenset(leaf.evaluator_name for leaf in leaves(tree) if isinstance(leaf, EvaluatorSays))


def _shown(limit: Limit) -> str:
    return ".".join(["limits", limit.scope, *([limit.subject] if limit.subject else []), limit.per, limit.unit])


def _once(member: str, names: Iterable[str], *, before: int | None = 0) -> None:
    """Refuse a name that comes again, at its entry in `member`, before whose own names `before` others come.

    None where the names are no entries of it.
    """
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            location = (member,) if before is None else (member, index - before)
            raise _at(location, f"{member} has {name} twice; names are what records refer to")
        seen.add(name)


def load_policy(path: Path) -> PolicySnapshot:
    """Read a policy from YAML, or from JSON when the file's name ends in `.json`.

    Raises:
        InvalidRequest: naming the file, line, column and entry that is missing, unknown, doubled or wrong.
    """
    return load_document(path, PolicySnapshot, "policy")


def read_policy(content: str, *, source: str) -> PolicySnapshot:
    """Read a policy from JSON text that stands in no file; `source` is how messages call it.

    Raises:
        InvalidRequest: naming the source and the entry that is missing, unknown, doubled or wrong.
    """
    return parse_document(content, PolicySnapshot, "policy", source=source, is_json=True, in_file=False)
