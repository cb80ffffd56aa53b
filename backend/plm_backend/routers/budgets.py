"""Budgets: what may be spent and what is, and how an operator changes that."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.vocabulary import BudgetScope

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.json_body import JsonRoute
from plm_backend.problems import BODIES, DOORS, documented
from plm_backend.schemas import (
    BudgetCorrection,
    BudgetDocument,
    BudgetPage,
    BudgetSet,
    budget_document,
)

router = APIRouter(prefix="/v1/budgets", tags=["budgets"], route_class=JsonRoute)


@router.get("", operation_id="listBudgets", response_model=BudgetPage, responses=documented(*DOORS))
async def list_budgets(
    platform: ThePlatform,
    caller: TheCaller,
    scope: BudgetScope | None = None,
    subject: Annotated[
        str | None, Query(min_length=1, max_length=200, description="With `scope`: whose, by name or id.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=2000, description="`next` of the page before")] = None,
) -> Any:
    """Total budgets and present windows of the tenant, from narrow to wide."""
    found = await platform.control_plane.storage.budgets.list(
        caller.tenant_id,
        limit=limit + 1,
        after=None if cursor is None else BudgetKey.decode(cursor),
        scope=scope,
        scope_id=_whose(scope, subject),
    )
    shown = found[:limit]
    following = shown[-1].key.encode() if len(found) > limit else None
    return {"items": [budget_document(each) for each in shown], "next": following}


@router.put("", operation_id="setBudget", response_model=BudgetDocument, responses=documented(*DOORS, *BODIES))
async def set_budget(body: BudgetSet, platform: ThePlatform, caller: TheCaller) -> Any:
    """Set a limit, which then holds in place of the policy's; a new budget is opened. Needs `plm.budgets`."""
    made = await platform.control_plane.set_budget(caller.tenant_id, body.key, body.limit, by=caller.principal)
    return budget_document(made)


@router.post(
    "/corrections",
    operation_id="correctBudget",
    response_model=BudgetDocument,
    responses=documented(*DOORS, *BODIES, 404, 409),
)
async def correct_budget(
    body: BudgetCorrection,
    platform: ThePlatform,
    caller: TheCaller,
    idempotency_key: Annotated[str, Header(min_length=1, max_length=255)],
) -> Any:
    """Correct what the present window has spent by a counter-entry, once per `Idempotency-Key`. Needs `plm.budgets`."""
    made = await platform.control_plane.correct_budget(
        caller.tenant_id,
        body.key,
        body.amount,
        reason=body.reason,
        command_id=idempotency_key,
        by=caller.principal,
    )
    return budget_document(made)


def _whose(scope: BudgetScope | None, subject: str | None) -> UUID | None:
    if subject is None:
        return None
    if scope is None:
        raise InvalidRequest("subject says whose budgets of a scope; send the scope too", field="scope")
    return BudgetKey.of(scope, subject, "").scope_id
