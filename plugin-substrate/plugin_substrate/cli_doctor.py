"""``cjm-ctl doctor``: what confines plugins on this machine. Status 0: all would be loaded, 1: some would not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from plugin_substrate.cli_settings import DataDir, data_folder
from plugin_substrate.doctor import Diagnosis, PluginReport, diagnose
from plugin_substrate.worker.isolation import IsolationProfile


def doctor(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell what this machine confines plugins with, and what each asks for, is granted and gets.

    Status 0 when every installed plugin would be loaded, 1 when one would not: it asks for more than it is granted,
    lacks a layer that is required of it, or has a manifest that cannot be used.
    """
    found = asyncio.run(diagnose(data_folder(data_dir).resolve(), IsolationProfile()))
    typer.echo(json.dumps(_as_json(found), indent=2) if as_json else _as_text(found))
    if not found.well:
        raise typer.Exit(1)


def _as_json(found: Diagnosis) -> dict[str, Any]:
    return {
        "well": found.well,
        "layers": [asdict(layer) for layer in found.layers],
        "plugins": [asdict(plugin) for plugin in found.plugins],
        "rejected": [{"manifest": str(path), "reason": reason} for path, reason in found.rejected],
    }


def _as_text(found: Diagnosis) -> str:
    width = max(len(layer.name) for layer in found.layers)
    lines = ["This machine keeps a plugin from:"]
    lines += [f"  {layer.name:{width}}  {layer.detail}" for layer in found.layers if layer.held]
    lines += [f"  {layer.name:{width}}  absent: {layer.detail}" for layer in found.layers if not layer.held]
    for plugin in found.plugins:
        lines += ["", plugin.name, *(f"  {line}" for line in _plugin_lines(plugin))]
    lines += [f"not used: {path}: {reason}" for path, reason in found.rejected]
    return "\n".join(lines)


def _plugin_lines(plugin: PluginReport) -> list[str]:
    rows = {
        "asks": _terms(plugin.asked) or "nothing",
        "granted": _terms(plugin.granted) or "nothing",
        "may": _terms(plugin.profile),
        "requires": ", ".join(plugin.required),
        "gets": ", ".join(plugin.layers),
        "lacks": "; ".join(f"{layer} ({reason})" for layer, reason in plugin.lacks.items()),
        "problem": plugin.problem,
    }
    return [f"{name:9} {text}" for name, text in rows.items() if text]


def _terms(terms: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in terms.items() if value not in ([], None))
