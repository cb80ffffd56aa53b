"""Amounts of money and of anything else that is counted: exact decimals."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, Field

SMALLEST = Decimal("0.00000001")
"""What the database keeps at the least, and counts in."""


def plain(amount: Decimal) -> Decimal:
    """The same amount in the one notation without exponent and trailing zeros, so that equal amounts hash equally."""
    return Decimal(format(amount.normalize(), "f"))


Amount = Annotated[Decimal, Field(ge=0, max_digits=20, decimal_places=8, allow_inf_nan=False), AfterValidator(plain)]
"""What the database keeps as numeric(20, 8), from zero up."""
