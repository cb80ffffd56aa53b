"""The commands that keep installed plugins, their secrets and the host's tools in order."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from plugin_substrate.cli_settings import DataDir, PluginsFile, Yes, data_folder, fail, plugins_file
from plugin_substrate.configuration import CondaType, get_config
from plugin_substrate.environments.spec import PluginSpec, load_plugins_file
from plugin_substrate.environments.upkeep import (
    disk_bytes,
    environment_of,
    manifest_file,
    regenerate_manifest,
    remove_plugin,
)
from plugin_substrate.environments.uv import find_uv, install_libraries
from plugin_substrate.errors import PluginConfigError, PluginError
from plugin_substrate.manifest import load_manifest
from plugin_substrate.platform import get_current_platform
from plugin_substrate.stores.secret import LocalSecretStore, default_secret_store

PluginName = Annotated[str, typer.Argument(help="The plugin's name.")]
Scope = Annotated[str | None, typer.Option("--scope", help="A tenant's id: only its workers see the secret.")]


def regenerate(
    name: PluginName,
    plugins: PluginsFile = None,
    package: Annotated[str | None, typer.Option("--package", help="What is installed: a requirement or path.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Take over what an installed plugin now says about itself, its configuration schema above all."""
    folder = data_folder(data_dir)
    try:
        source = package or load_manifest(manifest_file(folder, name)).install.package_source
        source = source or _spec(plugins, name).requirement
        manifest = regenerate_manifest(folder, name, source)
    except PluginError as error:
        fail(error)
    typer.echo(f"{name}: regenerated, version {manifest.code.version}")


def remove(
    name: PluginName,
    keep_env: Annotated[bool, typer.Option("--keep-env", help="Leave the environment.")] = False,
    yes: Yes = False,
    data_dir: DataDir = None,
) -> None:
    """Remove a plugin's manifest and its environment; its data, secrets and kept configuration stay."""
    folder = data_folder(data_dir)
    try:
        manifest_file(folder, name)
        if not yes:
            typer.confirm(f"Remove {name} from {folder}?", abort=True)
        removal = remove_plugin(folder, name, keep_environment=keep_env)
    except (PluginError, OSError) as error:
        fail(error)
    typer.echo(f"{name}: removed")
    if removal.kept:
        typer.echo(f"{name}: its environment stays, {removal.kept}", err=True)


def estimate_size(
    plugins: PluginsFile = None,
    plugin: Annotated[str | None, typer.Option("--plugin", "-p", help="Only this one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show where each environment is.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Tell what the environments of the listed plugins take on the disk; one that plugins share is counted once."""
    folder, total = data_folder(data_dir), 0
    try:
        specs = [_spec(plugins, plugin)] if plugin else load_plugins_file(plugins_file(plugins))
    except PluginError as error:
        fail(error)
    counted: set[Path] = set()
    for spec in specs:
        environment = environment_of(folder, spec.name)
        if environment is None:
            typer.echo(f"{spec.name}: not installed, so its size is not known")
            continue
        size = disk_bytes(environment)
        total += 0 if environment in counted else size
        counted.add(environment)
        typer.echo(f"{spec.name}: {size / 1e6:.1f} MB" + (f"  {environment}" if verbose else ""))
    typer.echo(f"total: {total / 1e6:.1f} MB")


def set_secret(
    name: PluginName,
    key: Annotated[str, typer.Argument(help="The variable that the worker reads.")],
    value: Annotated[
        str | None, typer.Option("--value", help="The secret; other users can read it in the process list.")
    ] = None,
    scope: Scope = None,
    data_dir: DataDir = None,
) -> None:
    """Keep a secret of a plugin; it is asked for, without showing it, unless it is given."""
    if value is None:
        value = typer.prompt(f"{key} of {name}", hide_input=True)
    try:
        _secrets(data_dir).set_secret(name, key, value, scope)
    except (PluginError, ValueError) as error:
        fail(error)
    typer.echo(f"{name}: {key} is kept; workers that run see it when they are reloaded")


def list_secrets(name: PluginName, scope: Scope = None, data_dir: DataDir = None) -> None:
    """List the names of a plugin's secrets, never what they are."""
    try:
        keys = _secrets(data_dir).list_keys(name, scope)
    except PluginError as error:
        fail(error)
    for key in keys:
        typer.echo(key)


def rotate_secrets_key(data_dir: DataDir = None) -> None:
    """Encrypt the secrets anew, with the first key in $CJM_SECRETS_KEY; the others there are tried for reading.

    Give hosts both keys, the new one first; run this; then take the old one away. If it is killed, run it again.
    """
    try:
        done = _secrets(data_dir).seal_anew()
    except PluginError as error:
        fail(error)
    typer.echo("encrypted with the first key; the others may go" if done else "there are no secrets")


def setup_host(plugins: PluginsFile = None, yes: Yes = False) -> None:
    """Install into this environment what plugins and host both need: the interface_libs of all plugins."""
    try:
        specs = load_plugins_file(plugins_file(plugins))
        libraries = sorted({library for spec in specs for library in spec.interface_libs})
        if not libraries:
            typer.echo("no plugin names interface_libs")
            return
        if not yes and not typer.confirm(f"Install {', '.join(libraries)} into {sys.prefix}?"):
            return
        install_libraries(Path(sys.executable), libraries)
    except PluginError as error:
        fail(error)
    typer.echo(f"installed: {', '.join(libraries)}")


def setup_runtime(
    force: Annotated[bool, typer.Option("--force", "-f", help="Kept for those who pass it; looking is free.")] = False,
) -> None:
    """Tell whether the tools that make environments are there, and what to install if they are not."""
    del force
    try:
        typer.echo(f"uv: {find_uv()}")
    except PluginError as error:
        fail(error)
    runtime = get_config().runtime
    if runtime.conda_type is not CondaType.MICROMAMBA:
        return
    named = runtime.binaries.get(get_current_platform())
    places = [named] if named else []
    places += [runtime.prefix / "bin" / "micromamba"] if runtime.prefix else []
    on_path = shutil.which("micromamba")
    found = next((place for place in [*places, *([Path(on_path)] if on_path else [])] if place.is_file()), None)
    if found is None:
        looked = ", ".join([*map(str, places), "the PATH"])
        fail(
            f"micromamba is not there (looked at {looked}): install it from https://mamba.readthedocs.io, or name it "
            f"in cjm.yaml as runtime.binaries.{get_current_platform()}, or leave runtime.conda_type out to use uv alone"
        )
    typer.echo(f"micromamba: {found}")


def _secrets(data_dir: Path | None) -> LocalSecretStore:
    return default_secret_store(data_folder(data_dir))


def _spec(plugins: Path | None, name: str) -> PluginSpec:
    file = plugins_file(plugins)
    found = [spec for spec in load_plugins_file(file) if spec.name == name]
    if not found:
        raise PluginConfigError(f"{file} lists no plugin {name!r}")
    return found[0]


COMMANDS: dict[str, Callable[..., None]] = {
    "regenerate-manifest": regenerate,
    "remove": remove,
    "estimate-size": estimate_size,
    "set-secret": set_secret,
    "list-secrets": list_secrets,
    "rotate-secrets-key": rotate_secrets_key,
    "setup-host": setup_host,
    "setup-runtime": setup_runtime,
}
