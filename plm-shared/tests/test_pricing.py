"""What a call costs, and when nobody can say."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from plm_shared.genai_pricing import GenaiPrices
from plm_shared.pricing import (
    CostStatus,
    PriceSource,
    PriceTable,
    TokenRates,
    compute_cost,
    in_eur,
    load_price_table,
)

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


PRICES = """
currency: USD
models:
  - id: m/1
    input_per_1k: 0.1000000000000000055
    output_per_1k: 2
"""


def test_a_price_file_keeps_every_digit_and_gives_a_cost(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    table = load_price_table(file)
    assert table.rates("m/1") == TokenRates(input_per_1k=Decimal("0.1000000000000000055"), output_per_1k=Decimal(2))
    cost = compute_cost("m/1", 1000, 1000, source=table, eur_per_unit={"USD": Decimal("0.5")})
    assert cost == (Decimal("1.05000000"), CostStatus.CALCULATED, "overrides-static")
    assert in_eur("m/1", source=table, eur_per_unit={"USD": Decimal(2)}) == TokenRates(
        input_per_1k=Decimal("0.2000000000000000110"), output_per_1k=Decimal(4)
    )
    assert in_eur("m/1", source=table) is None
    assert compute_cost("m/1", 1, 1, source=table).cost_eur is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (PRICES.replace("USD", "dollars"), "'currency'"),
        (PRICES.replace("currency: USD", ""), "'currency'"),
        (PRICES + "  - id: m/1\n    input_per_1k: 1\n    output_per_1k: 1\n", "line 7: model 'm/1'"),
        (PRICES.replace(": 2", ": -2"), "line 4: model 'm/1'"),
        (PRICES.replace(": 2", ": NaN"), "line 4: model 'm/1'"),
        (PRICES.replace(": 2", ": two"), "line 4: model 'm/1'"),
        (PRICES.replace(": 2", ": [2]"), "line 6: 'output_per_1k' must be text"),
        ("models: 7\ncurrency: EUR\n", "line 1: 'models' must be a list"),
        ("- a", "must be a mapping"),
        ("a: [", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_a_bad_price_file_is_refused_with_the_place(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_price_table(file)


def test_the_maintained_table_knows_public_models_in_dollars_and_guesses_nothing() -> None:
    prices: PriceSource = GenaiPrices()
    rates = prices.rates("openai/gpt-4o")
    assert rates == prices.rates("gpt-4o")
    assert rates is not None
    assert 0 < rates.input_per_1k < rates.output_per_1k
    assert prices.rates("no-such-model") is None
    assert prices.rates("no-such-provider/gpt-4o") is None
    assert compute_cost("openai/gpt-4o", 1, 1, source=prices).status is CostStatus.UNAVAILABLE
