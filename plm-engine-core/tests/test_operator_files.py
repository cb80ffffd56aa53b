"""Policy and capability files: what is wrong is named with its file and entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from plm_engine_core.control_plane.documents import parse_document
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import PolicySnapshot, load_policy
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, load_capabilities

POLICY = """
version: "1"
tier_by_mode: {read: auto_approve, plan-write: auto_approve, execute-write: always_approve}
risk_by_mode: {read: low, plan-write: low, execute-write: high}
budgets: {run: {EUR: 1, calls: 1}, tenant: {EUR: 1, calls: 1}}
"""
CAPABILITIES = """
capabilities:
  - {id: thing.read, description: look, mode: read, plugin: things}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_complete_files_are_read(tmp_path):
    assert load_policy(write(tmp_path, POLICY)).version == "1"
    assert [each.id for each in load_capabilities(write(tmp_path, CAPABILITIES))] == ["thing.read"]


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("version: '1'", "", "policy", "Input should be"),
        ("EUR: 1, calls: 1}, tenant", "EUR: x, calls: 1}, tenant", "budgets.run.EUR", r"\(given: 'x'\)"),
        ("execute-write: high", "execute-write: huge", "risk_by_mode.execute-write", "'low', 'medium' or 'high'"),
        ("budgets:", "budget:", "budgets", "Field required"),
        ("risk_by_mode:", "tier_by_mode: {read: unrestricted}\nrisk_by_mode:", "policy", "'tier_by_mode' twice"),
        ("risk_by_mode:", "extra: 1\nrisk_by_mode:", "extra", "Extra inputs"),
        ("budgets:", "budgets: [", "policy", "not YAML"),
    ],
)
def test_a_bad_policy_is_refused_with_the_place_of_its_error(tmp_path, old, new, field, message):
    text = "" if field == "policy" and new == "" else POLICY.replace(old, new)
    assert text != POLICY
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_policy(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "field", "message"),
    [
        ("mode: read", "mode: reed", "capabilities.0.mode", "given: 'reed'"),
        ("id: thing.read", "id: Thing", "capabilities.0.id", "pattern"),
        ("plugin: things", "plugins: things", "capabilities.0.plugin", "Field required"),
        ("mode: read", "mode: read, mode: execute-write", "capability file", "'mode' twice"),
        ("capabilities:", "things:", "capabilities", "Field required"),
        ("mode: read", "mode: read, cost: {max_eur: -1}", "capabilities.0.cost.max_eur", "greater than or equal to 0"),
    ],
)
def test_a_bad_capability_file_is_refused_with_the_place_of_its_error(tmp_path, old, new, field, message):
    path = write(tmp_path, CAPABILITIES.replace(old, new))
    with pytest.raises(InvalidRequest, match=message) as caught:
        load_capabilities(path)
    assert caught.value.field == field
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"gone\.yaml cannot be read: No such file"):
        load_policy(tmp_path / "gone.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match=r"binary\.yaml is not YAML"):
        load_capabilities(binary)


RULE = """
rules:
  - id: big
    capabilities: [thing.read]
    when:
      type: and
      conditions:
        - {type: action, actions: ["*"]}
        - {type: field, path: arguments.amount, operator: above, value: 3}
    then: ask
"""


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (POLICY + RULE, ":14:49: rules.0.when.and.conditions.1.field.operator"),
        (POLICY.replace("execute-write: high", "execute-write: huge"), ":4:44: risk_by_mode.execute-write"),
        (POLICY.replace("version:", "extra: 1\nversion:"), ":2:1: extra"),
        (POLICY.replace("EUR: 1, calls: 1}, tenant", "calls: 1}, tenant"), ":5:11: budgets.run"),
        (POLICY + "tiers: {blocked: [a.b], unrestricted: [a.b]}\n", ":6:1: tiers: a.b is both"),
    ],
)
def test_an_error_is_named_with_its_line_and_column(tmp_path, text, place):
    path = write(tmp_path, text)
    with pytest.raises(InvalidRequest) as caught:
        load_policy(path)
    assert f"{path}{place}" in str(caught.value)


def test_json_is_read_as_strictly_as_yaml(tmp_path):
    document = yaml.safe_load(POLICY)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")
    assert load_policy(path).digest == load_policy(write(tmp_path, POLICY)).digest
    for text, problem in (
        (
            json.dumps({**document, "grant_seconds": -1}, indent=1),
            r"policy\.json:23:2: grant_seconds: .* greater than 0",
        ),
        (
            json.dumps({**document, "grant_seconds": -1}, indent="\t"),
            r"policy\.json:23:2: grant_seconds: .* greater than 0",
        ),
        ('{"version": "1", "version": "2"}', "'version' twice"),
        ('{"max_eur_per_call": NaN}', "NaN is no JSON number"),
        ('{"version": ', "is not JSON: line 1, column 13"),
        ("version: 1", "is not JSON: line 1, column 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InvalidRequest, match=problem):
            load_policy(path)


@pytest.mark.parametrize("name", ["deep.yaml", "deep.json"])
def test_a_file_that_is_nested_without_end_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        load_policy(path)


def test_a_capability_registered_twice_is_refused():
    one = CapabilityDescriptor(id="a.b", description="x", mode="read", plugin="p")
    with pytest.raises(InvalidRequest, match=r"a\.b is registered twice"):
        CapabilityRegistry([one, one])


@given(st.text(max_size=300) | st.binary(max_size=300), st.sampled_from(["policy.yaml", "policy.json"]))
def test_whatever_a_file_holds_it_is_read_or_refused_with_its_name(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    with pytest.raises(InvalidRequest, match=name.replace(".", r"\.")):
        load_policy(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = ["id", "then", "when", "type", "and", "conditions", "condition", "path", "value", "read", "EUR"]
PIECES = st.recursive(
    SCALARS | st.sampled_from(["deny", "low", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


def read(text):
    """The policy, or the message of its refusal."""
    try:
        return parse_document(text, PolicySnapshot, "policy", source="p.yaml")
    except InvalidRequest as error:
        return str(error)


@given(st.sampled_from(sorted(PolicySnapshot.model_fields)), PIECES)
def test_whatever_stands_in_an_entry_it_is_read_or_refused_with_its_place(member, piece):
    answer = read(yaml.safe_dump({**yaml.safe_load(POLICY), member: piece}))
    if isinstance(answer, str):
        assert answer.startswith("p.yaml:")
    else:
        assert PolicySnapshot.model_validate_json(answer.model_dump_json()).digest == answer.digest
