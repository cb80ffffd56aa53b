"""The four things that may be written to the ledger, as frozen models.

A model only ever gains optional fields with defaults.
"""

from __future__ import annotations

from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from plm_shared.canonical_json import encodable
from plm_shared.idempotency import LONGEST_KEY, IdempotencyKey
from plm_shared.pricing import COSTLIEST, PricingVersion, TokenRates, ledger_amount

__all__ = [
    "EmitConnectorCallArgs",
    "EmitGovernanceArgs",
    "EmitLlmCallArgs",
    "EmitTelemetryArgs",
    "KernelEmitter",
]

_MOST_TOKENS = 2**31 - 1  # the columns are PostgreSQL integers


def _storable(text: str) -> str:
    if "\0" in text or not (text.isascii() or encodable(text)):
        raise ValueError("must not contain U+0000 or half a surrogate pair")
    return text


def _indexable(text: str) -> str:
    if len(text.encode()) > LONGEST_KEY:
        raise ValueError(f"must not be longer than {LONGEST_KEY} bytes, which is what an index can hold")
    return text


def _within_the_column(cost: Decimal) -> Decimal:
    if cost > COSTLIEST - 1 and ledger_amount(cost) >= COSTLIEST:
        raise ValueError(f"must be below {COSTLIEST} EUR, rounded to eight decimals")
    return cost


def _within_the_columns(rates: TokenRates | None) -> TokenRates | None:
    if rates is not None and ledger_amount(max(rates.input_per_1k, rates.output_per_1k)) >= COSTLIEST:
        raise ValueError(f"a rate must be below {COSTLIEST} EUR per thousand tokens, rounded to eight decimals")
    return rates


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


Text = Annotated[str, Field(min_length=1), AfterValidator(_storable)]
IndexedText = Annotated[Text, AfterValidator(_indexable)]
Rates = Annotated[TokenRates | None, AfterValidator(_within_the_columns)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=_MOST_TOKENS)]
Euro = Annotated[Decimal, Field(ge=0, lt=COSTLIEST, allow_inf_nan=False), AfterValidator(_within_the_column)]
EuroFloat = Annotated[float, Field(ge=0, lt=float(COSTLIEST), allow_inf_nan=False)]
Status = Annotated[Literal["pending", "calculated", "unavailable"], BeforeValidator(_plain)]


class _Args(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class _CostedArgs(_Args):
    pricing_version: PricingVersion
    cost_eur: EuroFloat | Euro | None = None
    cost_status: Status

    @model_validator(mode="after")
    def _cost_is_consistent(self) -> _CostedArgs:
        if self.cost_status == "calculated" and self.pricing_version == "unavailable":
            raise ValueError(
                "cost_status is 'calculated' but pricing_version is 'unavailable'; name the price's source"
            )
        if self.cost_status == "calculated" and self.cost_eur is None:
            raise ValueError("cost_status is 'calculated' but cost_eur is missing; give the cost")
        return self


class EmitTelemetryArgs(_Args):
    """Something happened in a span."""

    event_type: Text
    span_id: Text
    capability: Text
    payload: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: IdempotencyKey


class EmitGovernanceArgs(_Args):
    """A decision was taken; stored as telemetry under the capability ``governance``."""

    governance_event_type: Text
    span_id: Text
    payload: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: IdempotencyKey


class EmitLlmCallArgs(_CostedArgs):
    """A language model was called; one call per span. ``rates``, in EUR, are kept with the day's price."""

    span_id: Text
    model: IndexedText
    prompt_tokens: Tokens
    completion_tokens: Tokens
    idempotency_key: IdempotencyKey
    rates: Rates = None


class EmitConnectorCallArgs(_CostedArgs):
    """A connector was called; one call per span. Knowledge primitives are telemetry, never connector calls."""

    span_id: Text
    connector_id: IndexedText
    capability: IndexedText
    envelope: dict[str, Any] = Field(default_factory=dict)
    idempotency_key: IdempotencyKey

    @model_validator(mode="after")
    def _priced_name_is_indexable(self) -> EmitConnectorCallArgs:
        length = len(f"{self.connector_id}:{self.capability}".encode())
        if length > LONGEST_KEY:
            raise ValueError(f"connector_id and capability must not be longer than {LONGEST_KEY - 1} bytes together")
        return self


class KernelEmitter(Protocol):
    """Writes to the ledger. Writing the same key again does nothing; what else may happen is the emitter's to say."""

    def emit_telemetry(self, args: EmitTelemetryArgs) -> None:
        """Record an event."""

    def emit_governance(self, args: EmitGovernanceArgs) -> None:
        """Record a decision."""

    def record_llm_call(self, args: EmitLlmCallArgs) -> None:
        """Record a model call and its cost."""

    def record_connector_call(self, args: EmitConnectorCallArgs) -> None:
        """Record a connector call and its cost."""
