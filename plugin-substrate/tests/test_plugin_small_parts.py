"""Digests, platforms and what plugins declare."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate.declarations import parse_taxonomy, parse_worker_env
from plugin_substrate.hashing import hash_bytes, hash_dict_canonical, hash_file, verify_hash
from plugin_substrate.interface import EnvVarSpec
from plugin_substrate.platform import get_current_platform, is_compatible


def test_digests_name_their_algorithm(tmp_path: Path) -> None:
    assert hash_bytes(b"x") == "sha256:" + hashlib.sha256(b"x").hexdigest()
    assert hash_bytes(b"x", "sha1").startswith("sha1:")
    (tmp_path / "file").write_bytes(b"y" * 3_000_000)
    assert hash_file(tmp_path / "file") == hash_bytes(b"y" * 3_000_000)
    assert verify_hash(b"x", hash_bytes(b"x", "sha512"))
    assert verify_hash(b"x", "sha256:" + hashlib.sha256(b"x").hexdigest().upper())
    assert not verify_hash(b"y", hash_bytes(b"x"))
    for wrong in ("abc", "nothing:abc"):
        with pytest.raises(ValueError, match=r"algorithm|hash"):
            verify_hash(b"x", wrong)


@given(st.dictionaries(st.text(), st.integers() | st.text()))
def test_the_digest_of_an_object_does_not_depend_on_the_order_of_its_keys(value: dict[str, Any]) -> None:
    assert hash_dict_canonical(value) == hash_dict_canonical(dict(reversed(value.items())))


def test_nothing_has_the_digest_of_an_empty_object() -> None:
    assert hash_dict_canonical(None) == hash_dict_canonical({}) == hash_bytes(b"{}")


def test_a_plugin_that_lists_no_platform_runs_on_all() -> None:
    here = get_current_platform()
    assert here.count("-") == 1
    assert is_compatible([])
    assert is_compatible(["plan9-x64", here])
    assert not is_compatible(["plan9-x64"])
    assert is_compatible(["win-x64"], "win-x64")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("TOKEN", "worker_env[0] must be an object"),
        ({}, "worker_env[0].name must be a variable's name"),
        ({"name": "A=B"}, "must be a variable's name"),
        ({"name": "CJM_PLUGIN_DATA_DIR"}, "not one of the host's"),
        ({"name": "A", "secret": "yes"}, "worker_env[0].secret must be true or false, not 'yes'"),
        ({"name": "A", "secret": True, "default": "x"}, "have no place in a manifest"),
        ({"name": "A", "options": ["x"], "default": "y"}, "must be one of its options"),
        ({"name": "A", "default": "x\0"}, "holds a NUL"),
        ({"name": "A", "colour": 1}, "unknown key 'worker_env[0].colour'"),
    ],
)
def test_a_variable_that_is_declared_wrongly_is_named(entry: object, reason: str) -> None:
    problems: list[str] = []
    parse_worker_env([entry], "worker_env", problems)
    assert any(reason in problem for problem in problems)


def test_declared_variables_are_typed_and_each_is_declared_once() -> None:
    problems: list[str] = []
    specs = parse_worker_env([{"name": "A", "secret": True}, {"name": "B", "options": ["x"]}], "worker_env", problems)
    assert specs == (EnvVarSpec("A", secret=True), EnvVarSpec("B", options=["x"]))
    assert problems == []
    parse_worker_env([{"name": "A"}, {"name": "A"}], "worker_env", problems)
    assert problems == ["worker_env declares 'A' twice"]


def test_a_domain_has_a_label_and_a_wrong_taxonomy_its_reason() -> None:
    problems: list[str] = []
    assert parse_taxonomy({"domain": "speech_to_text"}, "taxonomy", problems).label == "Speech To Text"
    assert problems == []
    parse_taxonomy({"domain": 3, "colour": "red"}, "taxonomy", problems)
    assert problems == ["unknown key 'taxonomy.colour'", "taxonomy.domain must be text, not 3"]
