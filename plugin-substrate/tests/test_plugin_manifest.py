from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import ManifestError, PluginManager, load_manifest, write_manifest
from plugin_substrate.cli import app
from plugin_substrate.manifest import compute_config_schema_hash, manifest_to_dict, parse_manifest
from typer.testing import CliRunner

VALID: dict[str, Any] = {
    "format_version": "2.0",
    "install": {"python_path": "/opt/env/bin/python", "env_vars": {"MODE": "fast"}},
    "code": {
        "name": "reader",
        "version": "1.0",
        "description": "Reads.",
        "module": "reader.plugin",
        "class": "Reader",
        "interface": "plugin_substrate.interface.PluginInterface",
        "idempotent": True,
        "stateless": False,
        "preload": False,
        "capabilities": ["bom.read"],
        "config_schema": {"type": "object"},
    },
    "drift_tracking": {"config_schema_hash": compute_config_schema_hash({"type": "object"})},
    "overrides": {},
}


def changed(section: str, key: str, value: object) -> dict[str, Any]:
    data = copy.deepcopy(VALID)
    data[section][key] = value
    return data


BAD: list[tuple[object, str]] = [
    ([], "top level must be an object"),
    ({**VALID, "format_version": 2.0}, "format_version"),
    ({key: value for key, value in VALID.items() if key != "format_version"}, "format_version"),
    ({**VALID, "extra": 1}, "unknown key 'extra'"),
    ({**VALID, "code": []}, "code must be an object"),
    ({**VALID, "install": {}}, "install.python_path is missing"),
    (changed("install", "python_path", "bin/python"), "must be absolute"),
    (changed("install", "env_vars", {"A": 1}), "install.env_vars must be an object of texts"),
    (changed("install", "env_vars", {"A=B": "x"}), "impossible variable"),
    (changed("install", "pyton", "x"), "unknown key 'install.pyton'"),
    (changed("code", "name", "../x"), "code.name must be"),
    (changed("code", "name", ""), "code.name must not be empty"),
    (changed("code", "version", 1.0), "code.version must be text"),
    (changed("code", "module", "a b"), "code.module must be"),
    (changed("code", "class", "a.b"), "code.class must be"),
    (changed("code", "interface", "Plain"), "code.interface must be a dotted name"),
    (changed("code", "idempotent", "false"), "code.idempotent must be true or false"),
    (changed("code", "stateless", 1), "code.stateless must be true or false"),
    (changed("code", "capabilities", "bom.read"), "code.capabilities must be a list of texts"),
    (changed("code", "capabilities", ["read"]), "is not like 'bom.read'"),
    (changed("code", "capabilities", ["bom.read", "bom.read"]), "twice"),
    (changed("code", "config_schema", "none"), "code.config_schema must be an object"),
    (changed("code", "taxonomy", {"interface_fqcn": "other.Thing"}), "interface_fqcn"),
    (changed("drift_tracking", "config_schema_hash", "md5:1"), "config_schema_hash"),
]


@pytest.mark.parametrize(("data", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_manifest_is_refused_with_its_reason_and_validate_says_the_same(
    data: object, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data)
    assert reason in str(caught.value)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    done = CliRunner().invoke(app, ["validate", str(file)])
    assert done.exit_code == 1
    assert reason in done.stderr


def test_every_violation_is_listed_not_only_the_first() -> None:
    data = changed("code", "idempotent", "yes")
    data["install"]["python_path"] = 3
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data)
    assert len(caught.value.violations) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b'{"format_version": NaN}', "NaN"),
        (b'{"format_version": 1e999}', "1e999"),
        (b'{"a": 1, "a": 2}', "same key twice"),
        (b"[" * 200_000, "nested too deep"),
        (b" " * (1 << 20) + b"{}", "larger than"),
        (None, "cannot be read"),
    ],
    ids=["encoding", "nan", "infinity", "duplicate key", "deep", "large", "missing"],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_reason(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ManifestError, match=reason):
        load_manifest(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([(section, key) for section in ("install", "code") for key in VALID[section]]), json_values)
def test_any_value_in_any_place_is_accepted_or_refused_but_never_a_crash(place: tuple[str, str], value: object) -> None:
    try:
        parse_manifest(changed(*place, value))
    except ManifestError:
        return


def test_a_manifest_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    manifest = parse_manifest(VALID)
    write_manifest(tmp_path / "m" / "reader.json", manifest)
    assert load_manifest(tmp_path / "m" / "reader.json") == manifest
    assert manifest_to_dict(manifest) == VALID


def test_the_schema_hash_ignores_key_order_and_counts_a_missing_schema_as_empty() -> None:
    assert compute_config_schema_hash({"a": 1, "b": 2}) == compute_config_schema_hash({"b": 2, "a": 1})
    assert compute_config_schema_hash(None) == compute_config_schema_hash({})


def test_discovery_lists_what_it_refuses_with_the_reason_and_keeps_the_rest(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "data" / "manifests"
    write: Callable[[Path, Any], None] = lambda path, data: path.write_text(json.dumps(data))  # noqa: E731
    for folder in (first, second):
        folder.mkdir(parents=True)
    write(first / "reader.json", VALID)
    write(first / "broken.json", changed("code", "stateless", "no"))
    write(second / "reader.json", VALID)
    manager = PluginManager(data_dir=tmp_path / "data", search_paths=[first])
    (meta,) = manager.discover_manifests()
    assert (meta.name, meta.source, meta.capabilities, meta.idempotent) == (
        "reader",
        first / "reader.json",
        ("bom.read",),
        True,
    )
    assert {bad.path: bad.reason for bad in manager.rejected_manifests} == {
        first / "broken.json": "code.stateless must be true or false, not 'no'",
        second / "reader.json": f"'reader' is already taken by {first / 'reader.json'}",
    }
