"""Policy and capability files: what is wrong is named with its file and entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import load_policy
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


def test_a_capability_registered_twice_is_refused():
    one = CapabilityDescriptor(id="a.b", description="x", mode="read", plugin="p")
    with pytest.raises(InvalidRequest, match=r"a\.b is registered twice"):
        CapabilityRegistry([one, one])
