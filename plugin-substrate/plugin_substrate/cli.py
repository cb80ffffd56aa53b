"""``cjm-ctl``: install, list and check plugins. Status 0: all is well, 1: something failed, 2: wrong usage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from plugin_substrate.discovery import find_manifests, manifest_folders
from plugin_substrate.environments.install import Installer
from plugin_substrate.environments.spec import load_plugins_file
from plugin_substrate.errors import ManifestError, PluginConfigError
from plugin_substrate.manifest import load_manifest

app = typer.Typer(name="cjm-ctl", help="Install, list and check plugins.", no_args_is_help=True, add_completion=False)

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where environments and manifests live. Default: $CJM_DATA_DIR, else ~/.cjm."),
]


def data_folder(option: Path | None) -> Path:
    """Resolve the data directory: option, then CJM_DATA_DIR, then ~/.cjm."""
    return option or Path(os.environ.get("CJM_DATA_DIR") or Path.home() / ".cjm")


@app.command("install-all")
def install_all(
    plugins: Annotated[Path, typer.Option("--plugins", help="The file that lists the plugins.")] = Path("plugins.yaml"),
    data_dir: DataDir = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Make every environment anew.")] = False,
) -> None:
    """Install what is new or has changed; a plugin that fails does not keep the others from being installed."""
    try:
        specs = load_plugins_file(plugins)
    except PluginConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
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
    for bad in rejected:
        typer.echo(f"not used: {bad.path}: {bad.reason}", err=True)


@app.command("validate")
def validate(
    path: Annotated[Path, typer.Argument(help="A manifest (.json) or a plugins file (.yaml, .yml).")],
) -> None:
    """Check a file and name everything that is wrong with it."""
    try:
        if path.suffix == ".json":
            load_manifest(path)
        elif path.suffix in (".yaml", ".yml"):
            load_plugins_file(path)
        else:
            typer.echo(f"{path}: neither .json nor .yaml", err=True)
            raise typer.Exit(1)
    except ManifestError as error:
        for violation in error.violations:
            typer.echo(f"{path}: {violation}", err=True)
        raise typer.Exit(1) from None
    except PluginConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{path}: valid")


def main() -> None:
    """Entry point of the console script."""
    app()
