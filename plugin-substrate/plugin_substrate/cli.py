"""``cjm-ctl``: install, list and check plugins. Status 0: all is well, 1: something failed, 2: wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from plugin_substrate.cli_doctor import doctor
from plugin_substrate.cli_jobs import jobs, submit
from plugin_substrate.cli_settings import DataDir, PluginsFile, data_folder, fail, plugins_file
from plugin_substrate.cli_upkeep import COMMANDS
from plugin_substrate.config_check import checker_of
from plugin_substrate.configuration import load_config, set_config
from plugin_substrate.discovery import find_manifests, manifest_folders
from plugin_substrate.environments.install import Installer
from plugin_substrate.environments.spec import load_plugins_file
from plugin_substrate.environments.upkeep import environment_of
from plugin_substrate.errors import ManifestError, PluginConfigError
from plugin_substrate.manifest import load_manifest

app = typer.Typer(name="cjm-ctl", help="Install, list and check plugins.", no_args_is_help=True, add_completion=False)


@app.callback()
def settings(
    cjm_config: Annotated[Path | None, typer.Option("--cjm-config", help="The settings. Default: ./cjm.yaml.")] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where plugins live.")] = None,
    conda_prefix: Annotated[Path | None, typer.Option("--conda-prefix", help="Where a conda family is.")] = None,
    conda_type: Annotated[str | None, typer.Option("--conda-type", help="micromamba, miniforge or conda.")] = None,
) -> None:
    """Install, list and check plugins."""
    try:
        config = load_config(cjm_config, data_dir=data_dir, conda_prefix=conda_prefix, conda_type=conda_type)
    except PluginConfigError as error:
        fail(error)
    set_config(config)


@app.command("install-all")
def install_all(
    plugins: PluginsFile = None,
    data_dir: DataDir = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Make every environment anew.")] = False,
) -> None:
    """Install what is new or has changed; a plugin that fails does not keep the others from being installed."""
    try:
        specs = load_plugins_file(plugins_file(plugins))
    except PluginConfigError as error:
        fail(error)
    installer = Installer(data_folder(data_dir), force=force)
    failed = False
    for spec in specs:
        outcome = installer.install(spec)
        failed = failed or outcome.status == "failed"
        typer.echo(f"{outcome.name}: {outcome.status}" + (f": {outcome.reason}" if outcome.reason else ""))
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_plugins(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    envs: Annotated[bool, typer.Option("--envs", "-e", help="Show where each environment is.")] = False,
) -> None:
    """List the installed plugins, and the manifests that cannot be used with their reasons."""
    found, rejected = find_manifests(manifest_folders(data_folder(data_dir)))
    if as_json:
        answer: dict[str, Any] = {
            "plugins": [
                {
                    "name": meta.name,
                    "version": meta.version,
                    "description": meta.description,
                    "capabilities": list(meta.capabilities),
                    "idempotent": meta.idempotent,
                    "stateless": meta.stateless,
                    "preload": meta.preload,
                    "manifest": str(meta.source),
                }
                for meta in found
            ],
            "rejected": [{"manifest": str(bad.path), "reason": bad.reason} for bad in rejected],
        }
        typer.echo(json.dumps(answer, indent=2))
        return
    for meta in found:
        typer.echo(f"{meta.name} {meta.version}  {', '.join(meta.capabilities) or '-'}  {meta.description}")
        if envs:
            typer.echo(f"    {environment_of(data_folder(data_dir), meta.name) or meta.manifest.install.python_path}")
    for bad in rejected:
        typer.echo(f"not used: {bad.path}: {bad.reason}", err=True)


@app.command("validate")
def validate(
    path: Annotated[Path, typer.Argument(help="A manifest (.json) or a plugins file (.yaml, .yml).")],
    kind: Annotated[
        str | None, typer.Option("--format", "-f", help="manifest or plugins_yaml. Default: by the file's name.")
    ] = None,
) -> None:
    """Check a file and name everything that is wrong with it."""
    by_name = {".json": "manifest", ".yaml": "plugins_yaml", ".yml": "plugins_yaml"}
    try:
        match kind or by_name.get(path.suffix):
            case "manifest":
                code = load_manifest(path).code
                if code.config_schema:
                    checker_of(code.name, code.config_schema)
            case "plugins_yaml":
                load_plugins_file(path)
            case None:
                fail(f"{path}: neither .json nor .yaml; say what it is with --format")
            case other:
                fail(f"--format must be manifest or plugins_yaml, not {other!r}")
    except ManifestError as error:
        fail("\n".join(f"{path}: {violation}" for violation in error.violations))
    except PluginConfigError as error:
        fail(error)
    typer.echo(f"{path}: valid")


app.command("doctor")(doctor)
app.command("submit")(submit)
app.add_typer(jobs)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the console script."""
    app()
