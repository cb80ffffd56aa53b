"""What an operator does to a budget: set its limit, and correct what was booked by a counter-entry."""

from __future__ import annotations

import re
from decimal import Decimal
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, content_hash
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest
from plm_engine_core.control_plane.limits.budgets import Budget, BudgetKey
from plm_engine_core.control_plane.storage.ports import BudgetStore, Correction
from plm_engine_core.control_plane.texts import LONGEST_KEY, LONGEST_NAME, LONGEST_REASON, check_text
from plm_engine_core.control_plane.vocabulary import TOKENS, BudgetUnit

OPERATOR_SCOPE = "plm.budgets"
_SMALLEST = Decimal("0.00000001")
_LARGEST = Decimal(10) ** 12
_OURS = {unit.casefold(): str(unit) for unit in (*BudgetUnit, TOKENS)}
_UNIT = re.compile("[A-Za-z][A-Za-z0-9_]{0,39}")  # as a policy may register it


class BudgetDesk:
    """Every act needs the OAuth scope `plm.budgets` and is an event of the tenant's stream."""

    def __init__(self, store: BudgetStore) -> None:
        self._store = store

    async def set_limit(self, tenant_id: UUID, key: BudgetKey, limit: Decimal, *, by: Principal) -> Budget:
        """Set the limit of a budget, of its present window and of all later ones; opens it where it is not there yet.

        A limit below what is spent and reserved takes nothing back: the next call is denied.

        Raises:
            Forbidden: the caller lacks `plm.budgets`.
            InvalidRequest: the limit is no amount from 0 up that the books can hold, or the name or unit cannot be one.
            NotFound: the tenant does not exist.
        """
        _authorise(by)
        if not _bookable(limit) or limit < 0:
            raise InvalidRequest("the limit must be a number from 0 up, of at most eight decimals", field="limit")
        if not _UNIT.fullmatch(key.unit):
            raise InvalidRequest(f"{key.unit!r:.80} is no unit: 1 to 40 letters, digits and '_'", field="unit")
        ours = _OURS.get(key.unit.casefold(), key.unit)
        if ours != key.unit:  # nothing would ever be counted on it
            raise InvalidRequest(f"the unit {key.unit!r} is written {ours!r}", field="unit")
        if key.subject is not None:
            check_text(key.subject, field="subject", longest=LONGEST_NAME)
        return await self._store.set_limit(tenant_id, key, limit, actor=by.actor)

    async def correct(
        self, tenant_id: UUID, key: BudgetKey, amount: Decimal, *, reason: str, command_id: str, by: Principal
    ) -> Budget:
        """Book `amount` on what the budget's present window has spent: less than 0 gives back. Nothing is overwritten.

        The same command again books nothing more, and answers how the budget stands.

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
            raise InvalidRequest("the amount must be a number other than 0, of at most eight decimals", field="amount")
        content = [key.scope, key.scope_id, key.unit, key.period, amount.normalize(), reason]
        correction = Correction(
            key=key,
            amount=amount,
            reason=reason,
            command_id=command_id,
            digest=content_hash([str(each) for each in content]),
        )
        return await self._store.correct(tenant_id, correction, actor=by.actor)


def _bookable(amount: Decimal) -> bool:
    if not isinstance(amount, Decimal) or not amount.is_finite() or abs(amount) >= _LARGEST:
        return False
    return amount == amount.quantize(_SMALLEST)


def _authorise(by: Principal) -> None:
    if OPERATOR_SCOPE not in by.scopes:
        raise Forbidden(
            f"changing a budget needs the OAuth scope {OPERATOR_SCOPE}",
            reason="missing_scopes",
            missing_scopes=(OPERATOR_SCOPE,),
        )
