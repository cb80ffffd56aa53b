"""Capabilities: registered operations with everything admission must know before one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.documents import Flag, Number, load_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Unit
from plm_engine_core.control_plane.oauth_scopes import OAuthScope
from plm_engine_core.control_plane.vocabulary import BudgetUnit, CapabilityMode, CapabilityStatus


class CostBound(BaseModel):
    """The most one call may cost and use, and what it costs per unit of measured usage.

    `max_eur`, and `max_usage` per unit (tokens, CPU seconds, rows), are reserved before the call where a budget counts
    that unit; settlement charges the measured usage, in full even where it exceeds the bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_eur: Amount = Decimal(0)
    eur_per_unit: Mapping[str, Amount] = Field(default_factory=dict)
    max_usage: Mapping[Unit, Amount] = Field(default_factory=dict)

    @field_validator("max_usage")
    @classmethod
    def _has_its_own_place(cls, bounds: Mapping[str, Decimal]) -> Mapping[str, Decimal]:
        if not bounds.keys().isdisjoint(BudgetUnit):
            raise ValueError("EUR are bounded by max_eur, and a call is one call")
        return bounds

    def price(self, usage: Mapping[str, Decimal]) -> Decimal:
        """Cost in EUR of measured usage; units without a price cost nothing."""
        return sum((self.eur_per_unit.get(unit, Decimal(0)) * amount for unit, amount in usage.items()), Decimal(0))


class CapabilityDescriptor(BaseModel):
    """One registered version of an operation.

    `security_relevant` lists the arguments an approval is bound to; empty means all of them. `model_argument` names the
    argument that says which language model the call uses. `approval` has a human approve every use, whatever tier the
    policy gives it. `stateless` says that one plugin worker may serve several tenants. One whose plugin reaches a
    `network` has to declare its cost bound: what it calls may cost anything.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+$", max_length=120)
    version: str = Field(default="1", min_length=1)
    status: CapabilityStatus = CapabilityStatus.ACTIVE
    description: str = Field(min_length=1)
    mode: CapabilityMode
    certified: Flag = False
    idempotent: Flag = False
    stateless: Flag = False
    network: Flag = False
    approval: Flag = False
    plugin: str = Field(min_length=1)
    required_scopes: frozenset[OAuthScope] = frozenset()
    security_relevant: tuple[str, ...] = ()
    model_argument: str = ""
    cost: CostBound = CostBound()
    timeout_seconds: Number = Field(default=300.0, gt=0, le=86400)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.network and "max_eur" not in self.cost.model_fields_set:
            raise ValueError("a capability that reaches a network declares cost.max_eur, the most one call may cost")
        return self

    @property
    def inactive(self) -> str:
        """Why it may not be proposed; empty when it may."""
        if self.status in (CapabilityStatus.ACTIVE, CapabilityStatus.DEPRECATED):
            return ""
        return f"version {self.version} of capability {self.id} is {self.status.value}"


_PRECEDENCE = (
    CapabilityStatus.ACTIVE,
    CapabilityStatus.DEPRECATED,
    CapabilityStatus.DRAFT,
    CapabilityStatus.RETIRED,
)


class CapabilityRegistry:
    """An immutable set of capabilities; whoever needs it is handed it.

    Several versions of one capability may stand in it. What may be proposed is the active one, else the deprecated one.
    """

    def __init__(self, capabilities: Iterable[CapabilityDescriptor]) -> None:
        self.versions = tuple(capabilities)
        self._by_id: dict[str, CapabilityDescriptor] = {}
        by_place: dict[tuple[str, CapabilityStatus], CapabilityDescriptor] = {}
        versions: set[tuple[str, str]] = set()
        for capability in self.versions:
            if (capability.id, capability.version) in versions:
                raise InvalidRequest(
                    f"capability {capability.id} is registered twice; remove one of the two", field="capabilities"
                )
            versions.add((capability.id, capability.version))
            other = by_place.get((capability.id, capability.status))
            if other is not None and not capability.inactive:
                raise InvalidRequest(
                    f"versions {other.version} and {capability.version} of capability {capability.id} are both "
                    f"{capability.status.value}; which one is meant?",
                    field="capabilities",
                )
            by_place[capability.id, capability.status] = capability
        for status in reversed(_PRECEDENCE):
            self._by_id |= {name: each for (name, stands), each in by_place.items() if stands is status}

    def __iter__(self) -> Iterator[CapabilityDescriptor]:
        return iter(self._by_id.values())

    def get(self, capability_id: str) -> CapabilityDescriptor | None:
        """The version of a capability that counts, or None: an unknown one is refused by admission, by its own name."""
        return self._by_id.get(capability_id)


class _CapabilityFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    capabilities: tuple[CapabilityDescriptor, ...]


def load_capabilities(path: Path) -> CapabilityRegistry:
    """Read the operator's capability file (`capabilities:` a list of descriptors).

    Raises:
        InvalidRequest: naming the file and the entry that is missing, unknown, doubled or wrong.
    """
    return CapabilityRegistry(load_document(path, _CapabilityFile, "capability file").capabilities)
