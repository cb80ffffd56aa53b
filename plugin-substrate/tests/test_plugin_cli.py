"""The commands that look after installed plugins."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from cryptography.fernet import Fernet
from plugin_substrate import PluginManager, load_manifest, write_manifest
from plugin_substrate.cli import app
from plugin_substrate.manifest import CodeSection, DriftSection, InstallSection, ManifestV2, manifest_to_dict
from plugin_substrate.stores.secret import LocalSecretStore
from typer.testing import CliRunner

META = """
from plugin_substrate.interface import EnvVarSpec, PluginInterface

class Tiny(PluginInterface):
    name, version = "tiny", "2.0"
    WORKER_ENV = (EnvVarSpec("TOKEN", secret=True),)
    def initialize(self, config): self.config = config
    def execute(self, **arguments): return 42
    def get_config_schema(self): return {"type": "object", "title": "new"}
    def get_current_config(self): return self.config

def get_plugin_metadata():
    return {
        "name": "tiny", "version": "2.0", "description": "New.", "module": "tiny.meta", "class": "Tiny",
        "interface": "plugin_substrate.interface.PluginInterface", "python_path": "/somewhere/else",
        "config_schema": {"type": "object", "title": "new"},
    }
"""


class Host:
    """A data directory with a hand-made environment, in which the package ``tiny`` lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.environment = self.data_dir / "envs" / "tiny"
        self.manifest = self.data_dir / "manifests" / "tiny.json"

    def __call__(self, *arguments: str, text: str | None = None) -> Result:
        return CliRunner().invoke(app, ["--data-dir", str(self.data_dir), *arguments], input=text)

    def install(self) -> None:
        import subprocess

        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.environment)], check=True)
        (site,) = (self.environment / "lib").glob("python*/site-packages")
        (site / "tiny").mkdir()
        (site / "tiny" / "meta.py").write_text(META)
        (site / "tiny-2.0.dist-info").mkdir()
        (site / "tiny-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 2.0\n")
        (site / "tiny-2.0.dist-info" / "RECORD").write_text("tiny/meta.py,,\n")
        write_manifest(self.manifest, self.before())

    def before(self) -> ManifestV2:
        return ManifestV2(
            install=InstallSection(
                python_path=str(self.environment / "bin" / "python"),
                package_source="tiny==2.0",
                installed_at="2020-01-01T00:00:00+00:00",
                env_vars={"MODE": "fast"},
            ),
            code=CodeSection(
                name="tiny",
                version="1.0",
                description="Old.",
                module="tiny.meta",
                class_name="Tiny",
                interface="plugin_substrate.interface.PluginInterface",
            ),
            drift_tracking=DriftSection(),
            overrides={"category_override": "Mine"},
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def installed(host: Host) -> Host:
    host.install()
    return host


async def test_regenerate_takes_over_what_the_code_says_and_ends_the_drift(installed: Host) -> None:
    async def drifts() -> bool:
        async with PluginManager(data_dir=installed.data_dir) as manager:
            (meta,) = manager.discover_manifests()
            await manager.load_plugin_async(meta)
            found = manager.get_plugin_meta("tiny")
            return found is not None and found.config_schema_drift

    assert await drifts()
    done = installed("regenerate-manifest", "tiny")
    assert (done.exit_code, done.output) == (0, "tiny: regenerated, version 2.0\n")
    after = load_manifest(installed.manifest)
    assert (after.install, after.overrides) == (installed.before().install, {"category_override": "Mine"})
    assert (after.code.version, after.code.description) == ("2.0", "New.")
    assert after.code.worker_env[0]["name"] == "TOKEN"
    assert after.code.regenerated_at
    assert not await drifts()


def test_regenerate_upgrades_a_manifest_of_version_1(installed: Host) -> None:
    before = manifest_to_dict(installed.before())
    installed.manifest.write_text(json.dumps({**before["install"], **before["code"]}))
    assert installed("regenerate-manifest", "tiny").exit_code == 0
    assert json.loads(installed.manifest.read_text())["format_version"] == "2.0"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda host: host.manifest.unlink(), "no plugin is installed as 'tiny'"),
        (lambda host: host.manifest.write_text("{"), "is not JSON"),
        (lambda host: (host.environment / "bin" / "python").unlink(), "the environment of 'tiny' is gone"),
        (lambda host: next(host.environment.rglob("meta.py")).write_text("raise RuntimeError('no')"), "no"),
        (lambda host: next(host.environment.rglob("meta.py")).write_text(META.replace('"name": "tiny"', '"name": "x"')),
         "calls itself 'x'"),
    ],
    ids=["missing", "unreadable", "environment gone", "fails", "another name"],
)  # fmt: skip
def test_a_manifest_that_cannot_be_regenerated_stays_as_it_was(
    installed: Host, prepare: Callable[[Host], object], reason: str
) -> None:
    prepare(installed)
    before = installed.manifest.read_bytes() if installed.manifest.exists() else None
    done = installed("regenerate-manifest", "tiny")
    assert done.exit_code == 1
    assert reason in done.stderr
    assert (installed.manifest.read_bytes() if installed.manifest.exists() else None) == before


def test_without_a_recorded_source_it_is_taken_from_the_option_or_the_plugins_file(installed: Host) -> None:
    before = installed.before()
    write_manifest(installed.manifest, replace(before, install=replace(before.install, package_source="")))
    plugins = installed.folder / "plugins.yaml"
    plugins.write_text("plugins:\n  - {name: other, env_name: other, package: other}\n")
    done = installed("regenerate-manifest", "tiny", "--plugins", str(plugins))
    assert done.exit_code == 1
    assert "lists no plugin 'tiny'" in done.stderr
    assert installed("regenerate-manifest", "tiny", "--package", "tiny").exit_code == 0
    assert load_manifest(installed.manifest).install.package_source == "tiny"


def test_remove_takes_manifest_and_environment_and_nothing_that_the_plugin_wrote(installed: Host) -> None:
    kept = installed.data_dir / "data" / "tiny"
    kept.mkdir(parents=True)
    assert installed("remove", "tiny", text="n\n").exit_code == 1
    assert installed.manifest.exists()
    done = installed("remove", "tiny", "--yes")
    assert (done.exit_code, done.output) == (0, "tiny: removed\n")
    assert not installed.manifest.exists()
    assert not installed.environment.exists()
    assert kept.is_dir()
    done = installed("remove", "tiny", "--yes")
    assert done.exit_code == 1
    assert "no plugin is installed as 'tiny'" in done.stderr
    assert installed("remove", "../data", "--yes").exit_code == 1


def test_an_environment_that_is_shared_foreign_or_to_be_kept_stays(installed: Host) -> None:
    assert "as asked" in installed("remove", "tiny", "--yes", "--keep-env").stderr
    write_manifest(installed.manifest, installed.before())
    other = replace(installed.before(), code=replace(installed.before().code, name="other"))
    write_manifest(installed.manifest.with_name("other.json"), other)
    assert "other uses it too" in installed("remove", "tiny", "--yes").stderr
    foreign = replace(installed.before(), install=InstallSection(python_path=sys.executable))
    write_manifest(installed.manifest, foreign)
    assert "not one that cjm-ctl made" in installed("remove", "tiny", "--yes").stderr
    assert installed.environment.is_dir()


def test_sizes_are_told_and_a_shared_environment_counts_once(installed: Host) -> None:
    plugins = installed.folder / "plugins.yaml"
    names = ("tiny", "twin", "absent")
    lines = [f"  - {{name: {name}, env_name: e, package: x}}" for name in names]
    plugins.write_text("\n".join(["plugins:", *lines, ""]))
    (installed.environment / "data").write_bytes(b"x" * 1_000_000)
    twin = replace(installed.before(), code=replace(installed.before().code, name="twin"))
    write_manifest(installed.manifest.with_name("twin.json"), twin)
    done = installed("estimate-size", "--plugins", str(plugins), "--verbose")
    assert done.exit_code == 0
    told = dict(line.split(": ", 1) for line in done.output.splitlines())
    assert str(installed.environment) in told["tiny"]
    assert told["tiny"].split()[0] == told["twin"].split()[0] == told["total"].split()[0] != "0.0"
    assert "not installed" in told["absent"]
    assert installed("estimate-size", "--plugins", str(plugins), "-p", "unknown").exit_code == 1
    assert installed("estimate-size", "--plugins", str(installed.folder / "no.yaml")).exit_code == 1


def test_secrets_are_set_without_being_shown_and_listed_by_name(host: Host) -> None:
    done = host("set-secret", "tiny", "TOKEN", text="s3cret\n")
    assert done.exit_code == 0
    assert "s3cret" not in done.output
    assert host("set-secret", "tiny", "KEY", "--value", "other", "--scope", "test").exit_code == 0
    assert host("list-secrets", "tiny").output == "TOKEN\n"
    assert host("list-secrets", "tiny", "--scope", "test").output == "KEY\n"
    assert host("list-secrets", "unknown").output == ""
    store = LocalSecretStore(host.data_dir / "secrets" / "secrets.json")
    assert store.get_secret("tiny", "TOKEN") == "s3cret"
    assert host("set-secret", "tiny", "A=B", "--value", "x").exit_code == 1
    (host.data_dir / "secrets" / "secrets.json").write_text("{")
    done = host("set-secret", "tiny", "TOKEN", "--value", "x")
    assert done.exit_code == 1
    assert "is not a file of secrets" in done.stderr


def test_the_key_of_the_secrets_is_changed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    done = host("rotate-secrets-key")
    assert (done.exit_code, "set CJM_SECRETS_KEY" in done.stderr) == (1, True)
    monkeypatch.setenv("CJM_SECRETS_KEY", f"{new},{old}")
    assert host("rotate-secrets-key").output == "there are no secrets\n"
    file = host.data_dir / "secrets" / "secrets.json"
    LocalSecretStore(file, cipher=Fernet(old)).set_secret("tiny", "TOKEN", "s3cret")
    assert host("rotate-secrets-key").exit_code == 0
    assert LocalSecretStore(file, cipher=Fernet(new)).get_secret("tiny", "TOKEN") == "s3cret"


def test_the_settings_file_counts_for_every_command(host: Host) -> None:
    file = host.folder / "cjm.yaml"
    file.write_text("data_dir: elsewhere\n")
    runner = CliRunner(env={"CJM_DATA_DIR": ""})
    done = runner.invoke(app, ["--cjm-config", str(file), "set-secret", "tiny", "TOKEN", "--value", "x"])
    assert done.exit_code == 0
    assert (host.folder / "elsewhere" / "secrets" / "secrets.json").is_file()
    done = runner.invoke(app, ["--cjm-config", str(host.folder / "no.yaml"), "list"])
    assert (done.exit_code, "does not exist" in done.stderr) == (1, True)
    done = runner.invoke(app, ["--conda-type", "pip", "list"])
    assert (done.exit_code, "--conda-type must be one of" in done.stderr) == (1, True)


def test_the_runtime_is_found_or_it_is_said_what_to_install(host: Host) -> None:
    done = host("setup-runtime")
    assert done.exit_code == 0
    assert done.output.startswith("uv: ")
    prefix = host.folder / "conda"
    missing = host("--conda-type", "micromamba", "--conda-prefix", str(prefix), "setup-runtime")
    assert missing.exit_code == 1
    assert "install it from" in missing.stderr
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "micromamba").touch()
    assert host("--conda-type", "micromamba", "--conda-prefix", str(prefix), "setup-runtime").exit_code == 0


def test_a_schema_that_cannot_be_used_is_found_by_validate(host: Host) -> None:
    before = host.before()
    write_manifest(host.manifest, replace(before, code=replace(before.code, config_schema={"$ref": "http://x/y"})))
    done = host("validate", str(host.manifest))
    assert done.exit_code == 1
    assert "leads to 'http://x/y'" in done.stderr
    other = host.folder / "manifest.txt"
    other.write_bytes(host.manifest.read_bytes())
    assert "say what it is with --format" in host("validate", str(other)).stderr
    write_manifest(other, before)
    assert host("validate", str(other), "--format", "manifest").exit_code == 0


def test_environments_are_listed_when_asked_for(installed: Host) -> None:
    assert str(installed.environment) not in installed("list").output
    assert str(installed.environment) in installed("list", "--envs").output
