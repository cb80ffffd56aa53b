from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import (
    IsolationProfile,
    IsolationTerms,
    ManifestError,
    PluginConfigError,
    PluginConfinementError,
    PluginManager,
    PluginMeta,
)
from plugin_substrate.environments.spec import load_plugins_file
from plugin_substrate.manifest import load_manifest, write_manifest
from plugin_substrate.worker.isolation import (
    LAYERS,
    missing_layers,
    parse_required_layers,
    parse_terms,
    profile_to_json,
    resolve_profile,
)

MetaFactory = Callable[..., PluginMeta]
FULL = {
    "network": True,
    "processes": 4,
    "read_paths": ["/srv/models"],
    "write_paths": ["/srv/out"],
    "devices": ["/dev/dri"],
    "file_names": True,
    "memory_bytes": 1 << 30,
    "cpu_seconds": 60,
    "open_files": 64,
    "file_bytes": 1 << 20,
    "disk_bytes": 1 << 30,
}


def problems_of(data: object) -> list[str]:
    problems: list[str] = []
    parse_terms(data, "isolation", problems)
    return problems


def test_a_profile_is_the_same_after_writing_and_reading() -> None:
    profile = IsolationProfile.from_json(FULL)
    assert profile_to_json(profile) == FULL
    assert IsolationProfile.from_json(json.loads(json.dumps(profile_to_json(IsolationProfile())))) == IsolationProfile()
    assert {field.name for field in dataclasses.fields(IsolationTerms)} == set(FULL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("network", 1),
        ("network", "yes"),
        ("processes", True),
        ("processes", -1),
        ("processes", 1.0),
        ("memory_bytes", 0),
        ("memory_bytes", 1 << 64),
        ("cpu_seconds", 0),
        ("open_files", 2),
        ("read_paths", "/srv"),
        ("read_paths", ["srv"]),
        ("read_paths", ["/"]),
        ("read_paths", ["/srv/../etc"]),
        ("read_paths", ["/srv/"]),
        ("read_paths", ["//srv"]),
        ("read_paths", ["/srv\0"]),
        ("read_paths", ["/srv\n"]),
        ("read_paths", [5]),
        ("read_paths", ["/x"] * 65),
        ("write_paths", ["/" + "x" * 5000]),
        ("devices", ["/etc/passwd"]),
        ("devices", ["/dev/../etc"]),
    ],
)
def test_a_value_that_no_profile_can_have_is_named_with_what_it_should_be(key: str, value: object) -> None:
    (problem,) = problems_of({**FULL, key: value})
    assert problem.startswith(f"isolation.{key} must be ")


def test_every_violation_is_named_and_not_the_first_alone() -> None:
    problems = problems_of({"network": 1, "processes": "many", "gpus": 1})
    assert len(problems) == 3
    assert "unknown key 'isolation.gpus'" in problems


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values | st.dictionaries(st.sampled_from(sorted(FULL)), json_values | st.lists(st.text("/.a\0é\n"))))
def test_anything_is_read_as_terms_or_refused_and_what_is_read_comes_back(data: Any) -> None:
    problems: list[str] = []
    terms = parse_terms(data, "isolation", problems)
    if not problems:
        assert profile_to_json(terms) == data
        assert IsolationProfile.from_json(data)


@given(json_values)
def test_any_list_of_required_layers_is_read_or_refused(data: Any) -> None:
    problems: list[str] = []
    required = parse_required_layers(data, "require", problems)
    assert problems or {layer.partition(":")[0] for layer in required} <= set(LAYERS)


# -- what is asked, granted and got


def test_a_plugin_that_says_nothing_gets_what_is_granted_and_else_the_default() -> None:
    default = IsolationProfile()
    assert resolve_profile("p", IsolationTerms(), IsolationTerms(), default) == default
    granted = IsolationTerms(memory_bytes=1 << 28, read_paths=("/srv",))
    got = resolve_profile("p", IsolationTerms(), granted, default)
    assert (got.memory_bytes, got.read_paths, got.network) == (1 << 28, ("/srv",), False)


def test_a_plugin_gets_no_more_than_it_asks_for_except_of_paths() -> None:
    granted = IsolationTerms(network=True, processes=8, memory_bytes=8 << 30, read_paths=("/srv", "/opt"))
    asked = IsolationTerms(network=False, processes=2, memory_bytes=1 << 30, read_paths=("/srv/models",))
    got = resolve_profile("p", asked, granted, IsolationProfile())
    assert (got.network, got.processes, got.memory_bytes) == (False, 2, 1 << 30)
    assert got.read_paths == ("/srv", "/opt")


@pytest.mark.parametrize(
    ("asked", "granted", "missing"),
    [
        ({"network": True}, {}, "network: true"),
        ({"processes": 3}, {"processes": 2}, "processes: 3"),
        ({"read_paths": ["/srv"]}, {"read_paths": ["/srv/models"]}, r"read_paths: \[/srv\]"),
        ({"read_paths": ["/srv2"]}, {"read_paths": ["/srv"]}, r"read_paths: \[/srv2\]"),
        ({"memory_bytes": 4 << 30}, {}, "memory_bytes: 4294967296"),
        ({"cpu_seconds": 5}, {"cpu_seconds": 4}, "cpu_seconds: 5"),
        ({"devices": ["/dev/kvm"]}, {}, r"devices: \[/dev/kvm\]"),
    ],
)
def test_asking_for_more_than_is_granted_is_refused_with_the_grant_that_is_missing(
    asked: dict[str, Any], granted: dict[str, Any], missing: str
) -> None:
    with pytest.raises(PluginConfigError, match=missing) as caught:
        resolve_profile("p", parse_terms(asked, "", []), parse_terms(granted, "", []), IsolationProfile())
    assert caught.value.fields_invalid == (f"isolation.{next(iter(asked))}",)


async def test_a_plugin_that_asks_for_more_than_it_is_granted_is_not_even_started(
    manager: PluginManager, probe_meta: MetaFactory, tmp_path: Path
) -> None:
    meta = probe_meta(isolation={"network": True})
    with pytest.raises(PluginConfigError, match=r"plugins\.yaml.*network: true"):
        await manager.load_plugin_async(meta)
    assert not (tmp_path / "data").exists()
    meta = dataclasses.replace(meta, manifest=dataclasses.replace(meta.manifest, overrides={"isolation": FULL}))
    await manager.load_plugin_async(meta)


# -- what must hold


def test_a_layer_is_missing_when_it_is_absent_or_too_old() -> None:
    held = ("landlock:3", "seccomp")
    assert missing_layers(["seccomp", "landlock", "landlock:3"], held) == ()
    assert missing_layers(["landlock:4", "own_uid", "seccomp:1"], held) == ("landlock:4", "own_uid", "seccomp:1")


async def test_a_worker_that_holds_less_than_is_required_runs_no_plugin_code(
    probe_meta: MetaFactory, tmp_path: Path
) -> None:
    async with PluginManager(data_dir=tmp_path / "data", require=["rlimits", "landlock:900"]) as strict:
        with pytest.raises(PluginConfinementError, match=r"landlock:900.*doctor") as caught:
            await strict.load_plugin_async(probe_meta("SlowToLoad", module="hostile", name="hostile"))
    assert caught.value.missing_layers == ("landlock:900",)
    assert "rlimits" in caught.value.layers
    assert (caught.value.plugin_name, caught.value.phase) == ("hostile", "confine")
    assert not (tmp_path / "data/data/hostile/loading").exists()


async def test_a_manifest_may_require_layers_of_its_own(manager: PluginManager, probe_meta: MetaFactory) -> None:
    meta = probe_meta()
    meta.manifest.overrides["require"] = ["rlimits"]
    assert (await manager.load_plugin_async(meta)).alive
    meta.manifest.overrides["require"] = ["landlock:900"]
    with pytest.raises(PluginConfinementError):
        await manager.load_plugin_async(meta, instance_id="second")


def test_a_layer_that_does_not_exist_cannot_be_required(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'moat' is no layer; known: "):
        PluginManager(data_dir=tmp_path, require=["moat"])


# -- where it is written


def test_a_manifest_holds_what_is_asked_granted_and_required(probe_meta: MetaFactory, tmp_path: Path) -> None:
    manifest = dataclasses.replace(
        probe_meta(isolation={"processes": 2}).manifest,
        overrides={"isolation": {"processes": 4}, "require": ["seccomp"], "of_others": 1},
    )
    write_manifest(tmp_path / "m.json", manifest)
    again = load_manifest(tmp_path / "m.json")
    assert again == manifest
    assert again.asked_isolation == IsolationTerms(processes=2)
    assert again.granted_isolation == IsolationTerms(processes=4)
    assert again.required_layers == ("seccomp",)


def test_a_manifest_with_wrong_terms_is_refused(probe_meta: MetaFactory, tmp_path: Path) -> None:
    manifest = dataclasses.replace(
        probe_meta(isolation={"processes": "all"}).manifest,
        overrides={"isolation": {"gpus": 1}, "require": "seccomp"},
    )
    write_manifest(tmp_path / "m.json", manifest)
    with pytest.raises(ManifestError) as caught:
        load_manifest(tmp_path / "m.json")
    assert caught.value.violations == (
        "unknown key 'overrides.isolation.gpus'",
        "overrides.require must be a list of layers, not 'seccomp'",
    )
    with pytest.raises(ManifestError, match=r"code\.isolation\.processes must be"):
        manifest.asked_isolation  # noqa: B018


def test_plugins_yaml_grants_and_requires(tmp_path: Path) -> None:
    file = tmp_path / "plugins.yaml"
    file.write_text(
        "plugins:\n"
        "  - name: a\n    env_name: a\n    package: a\n"
        "    isolation:\n      network: true\n      memory_bytes: 1_073_741_824\n      read_paths: [/srv/models]\n"
        "    require: [seccomp, 'landlock:4']\n"
    )
    (spec,) = load_plugins_file(file)
    assert spec.isolation == IsolationTerms(network=True, memory_bytes=1 << 30, read_paths=("/srv/models",))
    assert spec.require == ("seccomp", "landlock:4")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("isolation: all", "line 5: isolation must be an object, not 'all'"),
        ("isolation: {network: 1}", "line 5: isolation.network must be true or false, not 1"),
        ("isolation: {gpus: 1}", "line 5: unknown key 'isolation.gpus'"),
        ("isolation: {network: true, network: false}", "line 5: isolation must be an object, not 'a mapping with"),
        ("isolation: {read_paths: &x [*x]}", "line 5: isolation must be an object, not 'a value that contains itself"),
        ("isolation: {memory_bytes: !!int x}", "line 5: isolation.memory_bytes must be a whole number"),
        ("require: [moat]", "line 5: require: 'moat' is no layer"),
    ],
)
def test_wrong_terms_in_plugins_yaml_are_named_with_their_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "plugins.yaml"
    file.write_text(f"plugins:\n  - name: a\n    env_name: a\n    package: a\n    {text}\n")
    with pytest.raises(PluginConfigError) as caught:
        load_plugins_file(file)
    assert problem in str(caught.value)


def test_the_readme_says_of_every_layer_and_grant_what_it_is_for() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [name for name in (*LAYERS, *FULL) if f"`{name}" not in text] == []
