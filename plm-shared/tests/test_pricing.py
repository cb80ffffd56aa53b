"""What a call costs, and when nobody can say."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from plm_shared.pricing import CostStatus, PriceTable, TokenRates, compute_cost

RATES = TokenRates(input_per_1k=Decimal("0.0015"), output_per_1k=Decimal("0.002"))
EURO = PriceTable(currency="EUR", models={"m": RATES, "vendor_model_1": RATES})
DOLLAR = PriceTable(currency="USD", models={"m": RATES}, pricing_version="litellm-live")


def test_a_price_in_euro_is_taken_as_it_is() -> None:
    assert compute_cost("m", 1000, 500, source=EURO) == (Decimal("0.0025"), CostStatus.CALCULATED, "overrides-static")


def test_a_model_is_found_under_its_normalised_name() -> None:
    assert compute_cost("Vendor/Model-1", 1, 0, source=EURO).status is CostStatus.CALCULATED


def test_another_currency_needs_a_rate_and_without_one_nothing_is_guessed() -> None:
    assert compute_cost("m", 1000, 0, source=DOLLAR) == (None, CostStatus.UNAVAILABLE, "unavailable")
    converted = compute_cost("m", 1000, 0, source=DOLLAR, eur_per_unit={"USD": Decimal("0.92")})
    assert converted == (Decimal("0.00138000"), CostStatus.CALCULATED, "litellm-live")


def test_an_unknown_model_or_no_source_is_unavailable() -> None:
    assert compute_cost("other", 1, 1, source=EURO).status is CostStatus.UNAVAILABLE
    assert compute_cost("m", 1, 1).pricing_version == "unavailable"


@pytest.mark.parametrize("rate", [Decimal(-1), Decimal("NaN"), Decimal("Infinity"), 0.1])
def test_an_impossible_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="input_per_1k"):
        TokenRates(input_per_1k=rate, output_per_1k=Decimal(0))


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_an_impossible_token_count_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match="completion_tokens"):
        compute_cost("m", 1, count, source=EURO)


@pytest.mark.parametrize("rate", [Decimal(0), Decimal(-1), Decimal("NaN")])
def test_an_impossible_currency_rate_is_refused(rate: Decimal) -> None:
    with pytest.raises(ValueError, match="USD"):
        compute_cost("m", 1, 1, source=DOLLAR, eur_per_unit={"USD": rate})
