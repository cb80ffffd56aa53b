"""What a model call costs, in EUR, computed once when the call is written.

Prices come from a source that the caller passes in. A source in another currency needs a configured rate; without
one the cost is unavailable, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_EVEN, Decimal
from enum import Enum
from typing import Final, Literal, NamedTuple, Protocol

__all__ = [
    "Cost",
    "CostStatus",
    "PriceSource",
    "PriceTable",
    "PricingSnapshot",
    "PricingVersion",
    "TokenRates",
    "compute_cost",
]

PricingVersion = Literal["litellm-live", "overrides-static", "unavailable"]
"""Where a price came from; the three values are frozen."""

_LEDGER_UNIT: Final = Decimal("0.00000001")  # the cost columns hold eight decimals
_PER: Final = 1000


class CostStatus(str, Enum):  # noqa: UP042 - the frozen contract is (str, Enum): str() of a member names the member
    """How far the cost of a call is known."""

    PENDING = "pending"
    """Not computed yet; may become one of the others once."""
    CALCULATED = "calculated"
    """Final, from a known price."""
    UNAVAILABLE = "unavailable"
    """Final: nobody knows the price."""


@dataclass(frozen=True, kw_only=True)
class PricingSnapshot:
    """The price of a model on a day."""

    model: str
    snapshot_date: date
    input_rate_per_1k: Decimal
    output_rate_per_1k: Decimal
    pricing_version: str


@dataclass(frozen=True, kw_only=True)
class TokenRates:
    """Price per thousand tokens in the source's currency.

    Raises:
        ValueError: a rate is negative, infinite or NaN.
    """

    input_per_1k: Decimal
    output_per_1k: Decimal

    def __post_init__(self) -> None:
        for name in ("input_per_1k", "output_per_1k"):
            rate = getattr(self, name)
            if not isinstance(rate, Decimal) or not rate.is_finite() or rate < 0:
                raise ValueError(f"{name} must be a finite Decimal that is not negative, not {rate!r}")


class PriceSource(Protocol):
    """Knows the rates of models."""

    @property
    def currency(self) -> str:
        """ISO 4217 code of every rate."""

    @property
    def pricing_version(self) -> PricingVersion:
        """Which of the frozen labels its prices carry."""

    def rates(self, model: str) -> TokenRates | None:
        """The model's rates, or None when it does not know the model."""


@dataclass(frozen=True, kw_only=True)
class PriceTable:
    """A maintained table of prices; a model is also found in lower case with ``_`` in place of ``/`` and ``-``."""

    currency: str
    models: Mapping[str, TokenRates]
    pricing_version: PricingVersion = "overrides-static"

    def rates(self, model: str) -> TokenRates | None:
        """The model's rates, or None."""
        return self.models.get(model) or self.models.get(model.lower().replace("/", "_").replace("-", "_"))


class Cost(NamedTuple):
    """The answer of ``compute_cost``."""

    cost_eur: Decimal | None
    status: CostStatus
    pricing_version: PricingVersion


_UNKNOWN: Final = Cost(None, CostStatus.UNAVAILABLE, "unavailable")


def compute_cost(
    model: str,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    source: PriceSource | None = None,
    eur_per_unit: Mapping[str, Decimal] | None = None,
) -> Cost:
    """The cost of a call in EUR, to eight decimals; ``unavailable`` without a price or without a currency rate.

    Raises:
        ValueError: a token count is negative or no integer, or a currency rate is not positive and finite.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("completion_tokens", completion_tokens)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be an integer that is not negative, not {count!r}")
    rates = source.rates(model) if source else None
    if source is None or rates is None:
        return _UNKNOWN
    exchange = Decimal(1) if source.currency == "EUR" else (eur_per_unit or {}).get(source.currency)
    if exchange is None:
        return _UNKNOWN
    if not exchange.is_finite() or exchange <= 0:
        raise ValueError(f"eur_per_unit[{source.currency!r}] must be positive and finite, not {exchange}")
    price = (rates.input_per_1k * prompt_tokens + rates.output_per_1k * completion_tokens) / _PER * exchange
    cost = price.quantize(_LEDGER_UNIT, rounding=ROUND_HALF_EVEN)
    return Cost(cost, CostStatus.CALCULATED, source.pricing_version)
