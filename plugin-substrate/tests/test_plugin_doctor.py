from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import PluginManager, PluginMeta, write_manifest
from plugin_substrate.cli import app
from plugin_substrate.worker.isolation import LAYERS
from typer.testing import CliRunner, Result

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
def installed(tmp_path: Path, probe_meta: MetaFactory) -> Callable[..., Path]:
    """Install plugins by their manifests alone."""

    def install(name: str, *, require: tuple[str, ...] = (), **options: Any) -> Path:
        manifest = probe_meta(name=name, **options).manifest
        if require:
            overrides = {**manifest.overrides, "require": list(require)}
            manifest = dataclasses.replace(manifest, overrides=overrides)
        write_manifest(tmp_path / "manifests" / f"{name}.json", manifest)
        return tmp_path

    return install


def doctor(data_dir: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["doctor", "--data-dir", str(data_dir), *options], catch_exceptions=False)


def test_the_doctor_says_of_every_layer_whether_it_holds_or_why_not(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    assert done.exit_code == 0
    layers = json.loads(done.output)["layers"]
    assert [layer["name"].partition(":")[0] for layer in layers] == list(LAYERS)
    assert all(layer["detail"] for layer in layers)
    held = {layer["name"].partition(":")[0] for layer in layers if layer["held"]}
    assert {"rlimits", "no_new_privs"} <= held


async def test_what_the_doctor_says_a_plugin_gets_is_what_it_gets(
    installed: Callable[..., Path], tmp_path: Path
) -> None:
    installed("plain")
    data_dir = installed("forks", granted={"processes": 2}, isolation={"processes": 1}, require=("seccomp",))
    done = doctor_in_thread(data_dir)
    said = {plugin["name"]: plugin for plugin in json.loads((await done).output)["plugins"]}
    assert (said["forks"]["asked"], said["forks"]["granted"]) == ({"processes": 1}, {"processes": 2})
    assert (said["forks"]["profile"]["processes"], said["forks"]["required"]) == (1, ["seccomp"])
    async with PluginManager(data_dir=tmp_path) as manager:
        for meta in manager.discover_manifests():
            assert list((await manager.load_plugin_async(meta)).layers) == said[meta.name]["layers"]
    assert "doctor" not in names_below(tmp_path), "nothing is left of the visit"


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


async def doctor_in_thread(data_dir: Path) -> Result:
    return await asyncio.to_thread(doctor, data_dir, "--json")


def test_a_plugin_that_would_not_be_loaded_is_told_and_the_status_says_so(installed: Callable[..., Path]) -> None:
    installed("fine")
    installed("greedy", isolation={"network": True})
    data_dir = installed("lacking", require=("landlock:900",))
    (data_dir / "manifests" / "broken.json").write_text("{")
    done = doctor(data_dir)
    assert done.exit_code == 1
    assert "grant it under `isolation:` of the plugin in plugins.yaml" in done.output
    assert "network: true" in done.output
    assert "required but not in force here: landlock:900" in done.output
    assert "not used: " in done.output
    said = {plugin["name"]: plugin for plugin in json.loads(doctor(data_dir, "--json").output)["plugins"]}
    assert {name: bool(plugin["problem"]) for name, plugin in said.items()} == {
        "fine": False,
        "greedy": True,
        "lacking": True,
    }


def test_no_code_of_a_plugin_runs_for_the_doctor(installed: Callable[..., Path]) -> None:
    data_dir = installed("explosive", module="fails_on_import")
    done = doctor(data_dir)
    assert done.exit_code == 0, done.output
