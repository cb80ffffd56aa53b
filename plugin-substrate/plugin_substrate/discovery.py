"""Finds manifests. A bad one is listed with its reason and never half-used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plugin_substrate.errors import ManifestError
from plugin_substrate.manifest import load_manifest
from plugin_substrate.metadata import PluginMeta, RejectedManifest


def manifest_folders(data_dir: Path, search_paths: Iterable[Path] = ()) -> list[Path]:
    """Return the folders to look in, in order: those given, then the installer's own."""
    return [*search_paths, data_dir / "manifests"]


def find_manifests(folders: Iterable[Path]) -> tuple[list[PluginMeta], list[RejectedManifest]]:
    """Read every ``*.json`` of the folders in name order; the first of several plugins with one name wins."""
    found: dict[str, PluginMeta] = {}
    rejected: list[RejectedManifest] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        try:
            manifest = load_manifest(path)
        except ManifestError as error:
            rejected.append(RejectedManifest(path=path, reason="; ".join(error.violations)))
            continue
        name = manifest.code.name
        if name in found:
            rejected.append(RejectedManifest(path=path, reason=f"{name!r} is already taken by {found[name].source}"))
            continue
        found[name] = PluginMeta(manifest=manifest, source=path)
    return list(found.values()), rejected
