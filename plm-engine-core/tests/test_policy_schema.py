"""The published schema and the reader of policies: whatever is read the schema takes, and what is strange neither."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plm_engine_core.cli.policy import policy_schema
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import read_policy
from plm_engine_core.control_plane.registry import load_capabilities

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
SOMEBODY = "00000000-0000-0000-0000-000000000001"
# What the page's own policy does not say, so that every key is there.
BESIDE = {
    "units": ["rows"],
    "teams": {"red": [SOMEBODY]},
    "limits": [{"scope": "agent", "per": "day", "unit": "tokens", "limit": "1000", "subject": "a"}],
    "time_zone": "Europe/Berlin",
    "time_zones": [{"scope": "user", "subject": SOMEBODY, "time_zone": "Asia/Kolkata"}],
    "models": {
        "allowed": ["house-*"],
        "tiers": {"trusted": ["house-*"]},
        "default_tier": "trusted",
        "by_tier": {"always_approve": ["trusted"]},
        "users": {SOMEBODY: {"allowed": ["x"]}},
    },
    "rate_limit_per_agent": {"per_second": 1, "burst": 2},
    "approval": {
        "timeout_seconds": 3600,
        "quorum": 2,
        "by_tier": {"always_approve": {"quorum": 2}},
        "by_risk": {"high": {"quorum": 3}},
        "escalation": {"required_scope": "b", "timeout_seconds": 5},
        "standing": {"max_uses": 3, "max_seconds": 60, "max_risk": "low", "any_resource": True},
    },
}
(WRITTEN,) = re.findall(r"```yaml\n# policy\.yaml\n(.+?)```", PAGE, re.DOTALL)
POLICY: dict[str, Any] = {**yaml.safe_load(WRITTEN), **BESIDE}
SCHEMA = jsonschema.Draft202012Validator(json.loads(policy_schema()))

Place = tuple[str | int, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*place, key))


def changed(place: Place, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(POLICY)
    within: Any = document
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    return document


def is_read(document: dict[str, Any]) -> bool:
    try:
        read_policy(json.dumps(document), source="a test")
    except InvalidRequest:
        return False
    return True


leaves = st.sampled_from([None, True, False, 0, 1, -1, 2, 0.5, 1e30, "", "0", "1", "1.5", "true", "low", "nan", "a.b"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(leaves.map(str), inner, max_size=2)
)


def test_the_policy_with_every_key_is_read_and_taken() -> None:
    assert is_read(POLICY)
    assert SCHEMA.is_valid(POLICY)
    assert POLICY.keys() == SCHEMA.schema["properties"].keys()


@given(st.sampled_from([*places(POLICY)]), values)
@settings(max_examples=400, deadline=None)
def test_whatever_is_read_the_schema_takes(place: Place, value: Any) -> None:
    document = changed(place, value)
    if is_read(document):
        SCHEMA.validate(document)


FORMS: list[Place] = [
    ("approval",),
    ("approval", "by_tier", "always_approve"),
    ("approval", "escalation"),
    ("approval", "standing"),
    ("auto_approve_when",),
    ("auto_approve_when", "conditions", 1),
    ("budgets",),
    ("evaluators", 0),
    ("limits", 0),
    ("time_zones", 0),
    ("models",),
    ("models", "users", SOMEBODY),
    ("rate_limit",),
    ("rules", 0),
    ("rules", 0, "when", "condition"),
    ("run_risk",),
    ("run_risk", "patterns", 0),
]


@pytest.mark.parametrize("place", FORMS, ids=str)
def test_a_key_that_nobody_knows_is_neither_read_nor_taken(place: Place) -> None:
    form: Any = POLICY
    for key in place:
        form = form[key]
    for document in (changed(place, {**form, "surprise": 1}), {**POLICY, "surprise": 1}):
        assert not is_read(document)
        assert not SCHEMA.is_valid(document)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("grant_seconds",), True),
        (("grant_seconds",), "300"),
        (("approval", "quorum"), True),
        (("approval", "quorum"), "2"),
        (("approval", "standing", "any_resource"), "no"),
        (("evaluators", 0, "gate"), 0),
        (("evaluators", 0, "gate"), "no"),
        (("rate_limit", "burst"), "1"),
        (("run_risk", "raises", "high"), True),
    ],
    ids=str,
)
def test_a_value_is_what_it_is_written_as_and_nothing_that_could_be_made_of_it(place: Place, value: Any) -> None:
    document = changed(place, value)
    assert not is_read(document)
    assert not SCHEMA.is_valid(document)


@pytest.mark.parametrize("entry", ["approval: 'no'", "network: 'false'", "idempotent: 1", "timeout_seconds: '300'"])
def test_so_it_is_in_the_file_of_capabilities(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "capabilities.yaml"
    path.write_text(
        f"capabilities:\n  - {{id: a.b, description: x, mode: read, plugin: p, {entry}}}\n", encoding="utf-8"
    )
    with pytest.raises(InvalidRequest, match=f"capabilities.0.{entry.partition(':')[0]}: Input should be a valid"):
        load_capabilities(path)
