"""Capabilities: registered operations with everything admission must know before one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from plm_engine_core.control_plane.amounts import Amount
from plm_engine_core.control_plane.document_places import place_in
from plm_engine_core.control_plane.documents import Flag, Number, load_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Unit
from plm_engine_core.control_plane.oauth_scopes import OAuthScope
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    CapabilityMode,
    CapabilityStatus,
    LockScope,
    TenantAccess,
)

Tenants = Annotated[frozenset[UUID], Field(min_length=1)]

_LISTS = ("allowed_tenants", "denied_tenants")
_NOT_EMPTY = {
    **dict.fromkeys(_LISTS, "name at least one tenant"),
    "lock": f"say {' or '.join(LockScope)}",
}
"""Members that would say nothing where their line was left empty, and what belongs there."""


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
    `network` has to declare its cost bound: what it calls may cost anything. Only `allowed_tenants` may use it, or all
    but `denied_tenants`, where one of the two is given; a draft only its `allowed_tenants`. With a `lock`, calls of it
    and of others with the same one exclude each other on the same resource, within a run or within the tenant.
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
    lock: LockScope | None = None
    allowed_tenants: Tenants | None = None
    denied_tenants: Tenants | None = None

    @field_validator("denied_tenants")
    @classmethod
    def _one_list(cls, denied: frozenset[UUID] | None, info: ValidationInfo) -> frozenset[UUID] | None:
        if denied is not None and info.data.get("allowed_tenants") is not None:
            raise ValueError("allowed_tenants says already that all others are denied; keep one of the two")
        return denied

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As a file has it: what is not there is left out, for an empty line is refused."""
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if value is not None or name not in _NOT_EMPTY}

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

    @property
    def names_tenants(self) -> bool:
        """Whether it is not for every tenant."""
        return self.allowed_tenants is not None or self.denied_tenants is not None

    def access_of(self, tenant_id: UUID) -> TenantAccess | None:
        """How it stands to this tenant; None when it names no tenants."""
        if self.allowed_tenants is not None:
            return TenantAccess.ALLOWED if tenant_id in self.allowed_tenants else TenantAccess.NOT_ALLOWED
        if self.denied_tenants is not None:
            return TenantAccess.DENIED if tenant_id in self.denied_tenants else TenantAccess.NOT_DENIED
        return None

    def seen_by(self, tenant_id: UUID) -> CapabilityDescriptor | None:
        """As this tenant may see it, without the names of others; None when it is not for this tenant."""
        access = self.access_of(tenant_id)
        if access is None:
            return self
        if access in (TenantAccess.DENIED, TenantAccess.NOT_ALLOWED):
            return None
        allowed = frozenset({tenant_id}) if access is TenantAccess.ALLOWED else None
        return self.model_copy(update={"allowed_tenants": allowed, "denied_tenants": None})


_PRECEDENCE = (
    CapabilityStatus.ACTIVE,
    CapabilityStatus.DEPRECATED,
    CapabilityStatus.DRAFT,
    CapabilityStatus.RETIRED,
)


class CapabilityRegistry:
    """An immutable set of capabilities; whoever needs it is handed it.

    Several versions of one capability may stand in it. What may be proposed is the active one, else the deprecated one,
    else by the tenants that it names a draft.
    """

    def __init__(self, capabilities: Iterable[CapabilityDescriptor]) -> None:
        self.versions = tuple(capabilities)
        self.names_tenants = any(each.names_tenants for each in self.versions)
        self._by_id: dict[str, CapabilityDescriptor] = {}
        by_place: dict[tuple[str, CapabilityStatus], CapabilityDescriptor] = {}
        versions: set[tuple[str, str]] = set()
        for number, capability in enumerate(self.versions):
            field = f"capabilities.{number}"
            if (capability.id, capability.version) in versions:
                raise InvalidRequest(
                    f"version {capability.version} of capability {capability.id} is registered twice; remove one",
                    field=field,
                )
            versions.add((capability.id, capability.version))
            other = by_place.get((capability.id, capability.status))
            if other is not None and _usable(capability) and _usable(other):
                raise InvalidRequest(
                    f"versions {other.version} and {capability.version} of capability {capability.id} are both "
                    f"{capability.status.value}; which one is meant?",
                    field=field,
                )
            if other is None or _usable(capability) or not _usable(other):
                by_place[capability.id, capability.status] = capability
        for status in reversed(_PRECEDENCE):
            self._by_id |= {name: each for (name, stands), each in by_place.items() if stands is status}

    def __iter__(self) -> Iterator[CapabilityDescriptor]:
        return iter(self._by_id.values())

    def get(self, capability_id: str) -> CapabilityDescriptor | None:
        """The version of a capability that counts, or None: an unknown one is refused by admission, by its own name."""
        return self._by_id.get(capability_id)


def _usable(capability: CapabilityDescriptor) -> bool:
    """Whether any tenant may propose it."""
    return not capability.inactive or (
        capability.status is CapabilityStatus.DRAFT and capability.allowed_tenants is not None
    )


def _not_left_empty(entry: Any) -> Any:
    """An empty line would open to all tenants what was meant for some, or lock nothing.

    Raises:
        ValueError: naming the line.
    """
    for name, remedy in _NOT_EMPTY.items():
        if isinstance(entry, Mapping) and entry.get(name, ()) is None:
            raise ValueError(f"{name} is empty; {remedy}, or leave the line out")
    return entry


class _CapabilityFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    capabilities: tuple[Annotated[CapabilityDescriptor, BeforeValidator(_not_left_empty)], ...]


def load_capabilities(path: Path) -> CapabilityRegistry:
    """Read the operator's capability file (`capabilities:` a list of descriptors).

    Raises:
        InvalidRequest: naming the file, the line and the entry that is missing, unknown, doubled or wrong.
    """
    read = load_document(path, _CapabilityFile, "capability file")
    try:
        return CapabilityRegistry(read.capabilities)
    except InvalidRequest as error:
        name, number = str(error.field).split(".")
        raise InvalidRequest(f"{place_in(path, (name, int(number)))}: {error}", field=error.field) from error
