"""What an operator does to a budget: set its limit, and correct what was booked by a counter-entry."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TypeGuard
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal, content_hash
from plm_engine_core.control_plane.amounts import SMALLEST, plain
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey, BudgetPlan
from plm_engine_core.control_plane.storage.ports import BudgetStore, Correction
from plm_engine_core.control_plane.texts import LONGEST_KEY, LONGEST_NAME, LONGEST_REASON, check_text
from plm_engine_core.control_plane.vocabulary import TOKENS, BudgetScope, BudgetUnit, Period

OPERATOR_SCOPE = "plm.budgets"
_LARGEST = Decimal(10) ** 12
_FORM = "below 10^12, as a Decimal of at most eight decimals"
_OURS = {unit.casefold(): str(unit) for unit in (*BudgetUnit, TOKENS)}
_UNIT = re.compile("[A-Za-z][A-Za-z0-9_]{0,39}")  # as a policy may register it


class BudgetDesk:
    """Every act needs the OAuth scope `plm.budgets` and is an event of the tenant's stream."""

    def __init__(self, store: BudgetStore) -> None:
        self._store = store

    async def set_limit(
        self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, plan: BudgetPlan, by: Principal
    ) -> Budget:
        """Set the limit of a budget, of its present window and of all later ones; opens it where it is not there yet.

        A limit below what is spent and reserved takes nothing back: the next call is denied. One that no call draws on
        under `plan` is refused: whoever set it would think themselves safe.

        Raises:
            Forbidden: the caller lacks `plm.budgets`.
            InvalidRequest: the limit is no amount from 0 up that the books can hold, the name or unit cannot be one,
                no call draws on the budget, or the storage does not know its time zone.
            NotFound: the tenant does not exist.
        """
        _authorise(by)
        check_amount(limit, field="limit")
        if not _UNIT.fullmatch(key.unit):
            raise InvalidRequest(f"{key.unit!r:.80} is no unit: 1 to 40 letters, digits and '_'", field="unit")
        ours = _OURS.get(key.unit.casefold(), key.unit)
        if ours != key.unit:  # nothing would ever be counted on it
            raise InvalidRequest(f"the unit {key.unit!r} is written {ours!r}", field="unit")
        if key.subject is not None:
            check_text(key.subject, field="subject", longest=LONGEST_NAME)
        if key.scope is BudgetScope.TENANT and key.scope_id != tenant_id:
            raise InvalidRequest(f"a tenant has its own budgets only, and this one is {tenant_id}", field="subject")
        if not plan.draws_on(key):
            window = "" if key.period is Period.TOTAL else f" per {key.period.value}"
            raise InvalidRequest(
                f"no call draws on this {key.scope.value} budget in {key.unit}{window}, so its limit would hold "
                f"nobody; the policy in force has to count it first, under '{plan.place_of(key)}'",
                field="unit",
            )
        zone = plan.zone_of(key, tenant_id)
        return await self._store.set_limit(tenant_id, key, plain(abs(limit)), time_zone=zone, actor=by.actor)

    async def correct(
        self, tenant_id: UUID, key: BudgetKey, amount: Decimal, *, reason: str, command_id: str, by: Principal
    ) -> Budget:
        """Book `amount` on what the budget's present window has spent: less than 0 gives back. Nothing is overwritten.

        The same command again books nothing more, and answers how the budget of that window stands.

        Raises:
            Forbidden: the caller lacks `plm.budgets`.
            InvalidRequest: no reason, no command id, an amount of 0 or one that the books cannot hold, or more is given
                back than was spent.
            IdempotencyConflict: the command id was used for another correction.
            NotFound: the budget is not there.
        """
        _authorise(by)
        check_text(reason, field="reason", longest=LONGEST_REASON)
        check_text(command_id, field="command_id", longest=LONGEST_KEY)
        if not _bookable(amount) or amount == 0:
            raise InvalidRequest(
                f"the amount must be a number other than 0 and {_FORM}, not {_shown(amount)}", field="amount"
            )
        content = [key.scope, key.scope_id, key.unit, key.period, amount.normalize(), reason]
        correction = Correction(
            key=key,
            amount=amount,
            reason=reason,
            command_id=command_id,
            digest=content_hash([str(each) for each in content]),
        )
        return await self._store.correct(tenant_id, correction, actor=by.actor)


def check_amount(amount: object, *, field: str) -> None:
    """Refuse what cannot be a limit.

    Raises:
        InvalidRequest: names the field.
    """
    if not _bookable(amount) or amount < 0:
        raise InvalidRequest(f"'{field}' must be a number from 0 up and {_FORM}, not {_shown(amount)}", field=field)


def _shown(amount: object) -> str:
    return f"{amount}"[:60] if isinstance(amount, Decimal) else f"{amount!r:.60}"


def _bookable(amount: object) -> TypeGuard[Decimal]:
    if not isinstance(amount, Decimal) or not amount.is_finite() or amount.copy_abs() >= _LARGEST:
        return False
    return amount == amount.quantize(SMALLEST)


def _authorise(by: Principal) -> None:
    check_principal(by, field="by")
    if OPERATOR_SCOPE not in by.scopes:
        raise Forbidden(
            f"changing a budget needs the OAuth scope {OPERATOR_SCOPE}",
            reason="missing_scopes",
            missing_scopes=(OPERATOR_SCOPE,),
        )
