"""The frozen contracts: keys, hashes, arguments, tags, envelopes."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import FrozenInstanceError
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plm_shared.canonical_json import JsonRefused
from plm_shared.capabilities import Capability, list_ids, load_capabilities
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitConnectorCallArgs, EmitGovernanceArgs, EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.knowledge_envelope import KnowledgeEnvelopeV1, KnowledgeSourceRef
from plm_shared.pricing import CostStatus
from pydantic import ValidationError

KEY = IdempotencyKey("t", "r", "s", "e", "h")
LLM: dict[str, Any] = {
    "span_id": "s",
    "model": "m",
    "prompt_tokens": 1,
    "completion_tokens": 0,
    "pricing_version": "litellm-live",
    "cost_eur": 0.5,
    "cost_status": "calculated",
    "idempotency_key": KEY,
}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_key_is_its_five_parts_joined_in_order() -> None:
    assert KEY.as_db_key() == "t:r:s:e:h"
    with pytest.raises(FrozenInstanceError):
        KEY.span_id = "x"  # type: ignore[misc]


@pytest.mark.parametrize("part", ["tenant_id", "trace_id", "span_id", "event_type", "content_hash"])
@pytest.mark.parametrize("value", ["", "a\0b", 7, "a:b"])
def test_a_part_that_could_confuse_two_keys_is_refused_by_name(part: str, value: Any) -> None:
    parts = {"tenant_id": "t", "trace_id": "r", "span_id": "s", "event_type": "e", "content_hash": "h", part: value}
    if (part, value) == ("content_hash", "a:b"):
        assert IdempotencyKey(**parts).as_db_key() == "t:r:s:e:a:b"
    else:
        with pytest.raises(ValueError, match=part):
            IdempotencyKey(**parts)


def test_the_hash_is_that_of_canonical_json() -> None:
    assert compute_content_hash({"b": [1, 1.5, True, None], "a": "ü"}) == sha('{"a":"ü","b":[1,1.5,true,null]}')
    assert compute_content_hash({"a": 1, "b": 2}) == compute_content_hash({"b": 2, "a": 1})
    assert compute_content_hash(1) != compute_content_hash(1.0)


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC), '"2020-01-02 03:04:05+00:00"'),
        (date(2020, 1, 2), '"2020-01-02"'),
        (time(3, 4), '"03:04:00"'),
        (uuid.UUID(int=0), '"00000000-0000-0000-0000-000000000000"'),
        (Decimal("1.10"), '"1.10"'),
        (PurePosixPath("a/b"), '"a/b"'),
        (CostStatus.PENDING, '"pending"'),
        (Colour.RED, '"Colour.RED"'),
    ],
)
def test_values_with_a_stable_text_are_hashed_as_that_text(value: Any, text: str) -> None:
    assert compute_content_hash(value) == sha(text)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (float("nan"), "payload"),
        ({"a": [0, float("inf")]}, "payload.a[1]"),
        ({"a": {1: "x"}}, "payload.a"),
        ({"a": {"b": {1, 2}}}, "payload.a.b"),
        ([object()], "payload[0]"),
        ({"a": b"x"}, "payload.a"),
        ("\ud800", "payload"),
    ],
)
def test_values_without_a_stable_text_are_refused_with_their_path(value: Any, path: str) -> None:
    with pytest.raises(JsonRefused) as caught:
        compute_content_hash(value)
    assert caught.value.path == path


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(JsonRefused, match="contains itself"):
        compute_content_hash(loop)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(PLAIN)
def test_every_plain_value_has_one_hash(value: Any) -> None:
    assert len(compute_content_hash(value)) == 64


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"cost_status": "done"}, "cost_status"),
        ({"pricing_version": "guess"}, "pricing_version"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"completion_tokens": -1}, "completion_tokens"),
        ({"prompt_tokens": 2**31}, "prompt_tokens"),
        ({"prompt_tokens": True}, "prompt_tokens"),
        ({"cost_eur": -0.1}, "cost_eur"),
        ({"cost_eur": float("nan")}, "cost_eur"),
        ({"cost_eur": Decimal("Infinity")}, "cost_eur"),
        ({"cost_eur": 1e10}, "cost_eur"),
        ({"cost_eur": Decimal("9999999999.999999995")}, "cost_eur"),
        ({"rates": {"input_per_1k": "1", "output_per_1k": "9999999999.999999995"}}, "rates"),
        ({"cost_eur": None}, "cost_eur"),
        ({"pricing_version": "unavailable"}, "pricing_version"),
        ({"span_id": ""}, "span_id"),
        ({"model": "a\0"}, "model"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValidationError, match=names):
        EmitLlmCallArgs(**{**LLM, **change})


def test_arguments_take_members_and_decimals_and_are_frozen() -> None:
    args = EmitLlmCallArgs(**{**LLM, "cost_status": CostStatus.CALCULATED, "cost_eur": Decimal("0.12345678")})
    assert args.cost_status == "calculated"
    assert str(args.cost_eur) == "0.12345678"
    with pytest.raises(ValidationError, match="frozen"):
        args.model = "x"  # type: ignore[misc]


def test_the_fields_and_their_defaults_are_those_of_the_contract() -> None:
    assert list(EmitTelemetryArgs.model_fields) == [
        "event_type",
        "span_id",
        "capability",
        "payload",
        "idempotency_key",
    ]
    assert list(EmitGovernanceArgs.model_fields) == ["governance_event_type", "span_id", "payload", "idempotency_key"]
    assert set(EmitLlmCallArgs.model_fields) == {*LLM, "rates"}
    assert set(EmitConnectorCallArgs.model_fields) == {
        "span_id",
        "connector_id",
        "capability",
        "envelope",
        "pricing_version",
        "cost_eur",
        "cost_status",
        "idempotency_key",
    }
    assert EmitTelemetryArgs(event_type="e", span_id="s", capability="read", idempotency_key=KEY).payload == {}


def test_a_key_given_as_a_mapping_is_checked_as_well() -> None:
    fields = {"tenant_id": "t", "trace_id": "r", "span_id": "s:x", "event_type": "e", "content_hash": "h"}
    with pytest.raises(ValueError, match="span_id"):
        EmitTelemetryArgs(event_type="e", span_id="s", capability="read", idempotency_key=fields)


def test_the_shipped_catalogue_describes_every_tag() -> None:
    catalogue = load_capabilities()
    assert list_ids() == list(Capability) == list(catalogue)
    assert all(entry.description and entry.category for entry in catalogue.values())
    assert catalogue[Capability.EXTERNAL_RUNTIME].category == "runtime"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("capabilities:\n- id: read\n- id: fly", "line 3: unknown capability id 'fly'"),
        ("capabilities:\n- {id: write}\n- {id: read}\n- {id: write}", "line 4: capability id 'write' appears twice"),
        ("capabilities: 7", "list of mappings"),
        ("[]", "list of mappings"),
        ("{", "not YAML"),
    ],
)
def test_a_bad_catalogue_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_capabilities(file)


def test_a_missing_catalogue_is_a_missing_file_and_missing_words_are_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_capabilities(tmp_path / "none.yaml")
    file = tmp_path / "c.yaml"
    file.write_text("capabilities: [{id: read}]")
    assert load_capabilities(file)[Capability.READ].description == ""


def test_a_knowledge_envelope_is_frozen_and_strict() -> None:
    envelope = KnowledgeEnvelopeV1(
        primitive="lookup",
        capability="knowledge_call",
        baseline_version="1",
        source_refs=[KnowledgeSourceRef(ref_id="a", ref_type="doc")],
        outcome="ok",
    )
    assert envelope.schema_version == "1.0"
    assert KnowledgeEnvelopeV1.model_validate_json(envelope.model_dump_json()) == envelope
    with pytest.raises(ValidationError, match="schema_version"):
        KnowledgeEnvelopeV1.model_validate({**envelope.model_dump(), "schema_version": "2.0"})
    with pytest.raises(ValidationError, match="extra"):
        KnowledgeEnvelopeV1.model_validate({**envelope.model_dump(), "extra": 1})
