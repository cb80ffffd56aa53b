"""What a model call costs, in EUR, computed once when the call is written.

Prices come from a source that the caller passes in. A source in another currency needs a configured rate; without
one the cost is unavailable, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal, InvalidOperation, localcontext
from enum import Enum
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

from plm_shared.yaml_entries import read_entries

__all__ = [
    "COSTLIEST",
    "Cost",
    "CostStatus",
    "PriceSource",
    "PriceTable",
    "PricingSnapshot",
    "PricingVersion",
    "TokenRates",
    "compute_cost",
    "in_eur",
    "ledger_amount",
    "load_price_table",
]

PricingVersion = Literal["litellm-live", "overrides-static", "unavailable"]
"""Where a price came from; the three values are frozen."""

_LEDGER_DECIMALS: Final = 8  # of the columns, which are numeric(18, 8)
_LEDGER_UNIT: Final = Decimal(1).scaleb(-_LEDGER_DECIMALS)
COSTLIEST: Final = Decimal(10) ** 10
"""In EUR; the ledger's columns hold less."""
_MOST_TOKENS: Final = 2**31 - 1  # the columns are PostgreSQL integers
_PER: Final = 1000
_EXACT: Final = Context(prec=80)
_CURRENCY: Final = re.compile(r"[A-Z]{3}")


def ledger_amount(amount: Decimal) -> Decimal:
    """A finite amount as the ledger's columns hold it: with at most eight decimals, halves rounded up."""
    exponent = amount.as_tuple().exponent
    if isinstance(exponent, int) and exponent >= -_LEDGER_DECIMALS:
        return amount
    return amount.quantize(_LEDGER_UNIT, rounding=ROUND_HALF_UP, context=_EXACT)


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
        ValueError: a rate is negative, too large for the ledger, infinite or NaN.
    """

    input_per_1k: Decimal
    output_per_1k: Decimal

    def __post_init__(self) -> None:
        for name in ("input_per_1k", "output_per_1k"):
            rate = getattr(self, name)
            if not isinstance(rate, Decimal) or not rate.is_finite() or not 0 <= rate < COSTLIEST:
                raise ValueError(f"{name} must be a Decimal of at least 0 and below {COSTLIEST}, not {rate!r}")


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


def load_price_table(path: Path | str) -> PriceTable:
    """Prices from a YAML file: ``currency`` and a list ``models`` of ``id``, ``input_per_1k``, ``output_per_1k``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another shape, a price is no finite number or negative, or a model appears twice;
            the message names the model and the line.
    """
    source = Path(path)
    top, entries = read_entries(source, "models")
    if not _CURRENCY.fullmatch(top.get("currency", "")):
        raise ValueError(f"{source}: 'currency' must be an ISO 4217 code such as EUR, not {top.get('currency')!r}")
    models: dict[str, TokenRates] = {}
    for line, entry in entries:
        model = entry.get("id", "")
        if not model or model in models:
            raise ValueError(f"{source}, line {line}: model {model!r} has no id, or appears twice; keep one")
        try:
            rates = TokenRates(
                input_per_1k=Decimal(entry.get("input_per_1k", "")),
                output_per_1k=Decimal(entry.get("output_per_1k", "")),
            )
        except (ValueError, InvalidOperation):
            raise ValueError(
                f"{source}, line {line}: model {model!r} needs input_per_1k and output_per_1k, plain numbers"
            ) from None
        models[model] = rates
    return PriceTable(currency=top["currency"], models=models)


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
        ValueError: a token count is no integer from 0 to 2 147 483 647, or a currency rate is not positive and finite.
    """
    for name, count in (("prompt_tokens", prompt_tokens), ("completion_tokens", completion_tokens)):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST_TOKENS:
            raise ValueError(f"{name} must be an integer from 0 to {_MOST_TOKENS}, not {count!r}")
    rates = in_eur(model, source=source, eur_per_unit=eur_per_unit) if source else None
    if source is None or rates is None:
        return _UNKNOWN
    with localcontext(_EXACT):
        price = (rates.input_per_1k * prompt_tokens + rates.output_per_1k * completion_tokens) / _PER
        cost = price.quantize(_LEDGER_UNIT, rounding=ROUND_HALF_EVEN)
    return Cost(cost, CostStatus.CALCULATED, source.pricing_version)


def in_eur(model: str, *, source: PriceSource, eur_per_unit: Mapping[str, Decimal] | None = None) -> TokenRates | None:
    """The model's rates in EUR, as ``EmitLlmCallArgs.rates`` takes them; None without a price or a currency rate.

    Raises:
        ValueError: a currency rate is not positive and finite.
    """
    rates = source.rates(model)
    exchange = Decimal(1) if source.currency == "EUR" else (eur_per_unit or {}).get(source.currency)
    if rates is None or exchange is None:
        return None
    if not exchange.is_finite() or exchange <= 0:
        raise ValueError(f"eur_per_unit[{source.currency!r}] must be positive and finite, not {exchange}")
    with localcontext(_EXACT):
        return TokenRates(input_per_1k=rates.input_per_1k * exchange, output_per_1k=rates.output_per_1k * exchange)
