"""Prices of public models, maintained by others: the table inside the ``genai-prices`` package ([prices] extra).

No network: the table is as old as the installed package, so keep the package current.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from plm_shared.pricing import PricingVersion, TokenRates

__all__ = ["GenaiPrices"]

_THOUSANDS_IN_A_MILLION: Final = 1000


class GenaiPrices:
    """A ``PriceSource`` in USD. A model is named as its provider names it, or as ``provider/model``.

    A model whose price depends on the length of the prompt has no single rate: it is unknown here, never guessed.

    Raises:
        ImportError: the ``prices`` extra is not installed.
    """

    currency = "USD"
    pricing_version: PricingVersion = "overrides-static"

    def __init__(self) -> None:
        try:
            import genai_prices
        except ImportError as error:
            raise ImportError("GenaiPrices needs genai-prices: install plm-shared[prices]") from error
        self._table = genai_prices

    def rates(self, model: str) -> TokenRates | None:
        """The model's rates, or None."""
        provider, _, name = model.rpartition("/")
        usage = self._table.Usage(input_tokens=1, output_tokens=1)
        try:
            price = self._table.calc_price(usage, name, provider_id=provider or None).model_price
        except LookupError:
            return None
        each = (price.input_mtok, price.output_mtok)
        if not all(isinstance(rate, Decimal) for rate in each):
            return None
        return TokenRates(
            input_per_1k=Decimal(str(each[0])) / _THOUSANDS_IN_A_MILLION,
            output_per_1k=Decimal(str(each[1])) / _THOUSANDS_IN_A_MILLION,
        )
