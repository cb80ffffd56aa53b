"""What a call reserves, and from whose budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from plm_engine_core.control_plane.vocabulary import BudgetScope, BudgetUnit


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """One amount to set aside in one budget."""

    scope: BudgetScope
    scope_id: UUID
    unit: BudgetUnit
    amount: Decimal


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One budget as it stands; spent plus reserved never exceeds the limit, except by a measured overspend."""

    scope: BudgetScope
    scope_id: UUID
    unit: BudgetUnit
    limit: Decimal
    spent: Decimal
    reserved: Decimal


def demand(tenant_id: UUID, run_id: UUID, amounts: Mapping[BudgetUnit, Decimal]) -> tuple[Reserve, ...]:
    """The reservations of one call, from narrow to wide and then by unit.

    That order is the order of locks: the widest row is hot, so it is taken last and held shortest.
    """
    return tuple(
        Reserve(scope=scope, scope_id=scope_id, unit=unit, amount=amounts[unit])
        for scope, scope_id in ((BudgetScope.RUN, run_id), (BudgetScope.TENANT, tenant_id))
        for unit in sorted(amounts)
    )
