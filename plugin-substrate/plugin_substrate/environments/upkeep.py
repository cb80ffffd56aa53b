"""What is done with installed plugins: describe one anew, take one away, measure what one takes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from plugin_substrate.environments.install import describe_distribution, manifest_of
from plugin_substrate.environments.spec import PluginSpec, distribution_name
from plugin_substrate.environments.uv import installing
from plugin_substrate.errors import ManifestError, PluginConfigError, PluginFatalError
from plugin_substrate.manifest import NAME_PATTERN, ManifestV2, load_manifest, manifest_to_dict, write_manifest


def manifest_file(data_dir: Path, name: str) -> Path:
    """Return where a plugin's manifest is; a `PluginConfigError` when there is none."""
    file = data_dir / "manifests" / f"{name}.json"
    if not NAME_PATTERN.fullmatch(name) or not file.is_file():
        raise PluginConfigError(
            f"no plugin is installed as {name!r} below {data_dir}; `cjm-ctl list` shows those there are"
        )
    return file


def regenerate_manifest(data_dir: Path, name: str, source: str) -> ManifestV2:
    """Ask an installed plugin about itself anew and write its manifest, in the newest form.

    What the installer and the operator put there stays. ``source`` is what was installed: a requirement or a path. An
    unknown plugin, an environment that is gone and a plugin that cannot be described are typed errors, and the manifest
    stays as it was.
    """
    file = manifest_file(data_dir, name)
    with installing(data_dir / "envs"):
        before = load_manifest(file)
        python = Path(before.install.python_path)
        if not python.is_file():
            raise PluginFatalError(f"the environment of {name!r} is gone: {python} is not there; install it anew")
        described = describe_distribution(python, _distribution_of(name, source))
        if described.get("name") != name:
            raise PluginConfigError(f"the plugin there calls itself {described.get('name')!r}, not {name!r}")
        install = {**manifest_to_dict(before)["install"], "package_source": source}
        after = manifest_of(described, install, before.overrides, name)
        write_manifest(file, after)
    return after


def _distribution_of(name: str, source: str) -> str:
    editable = source.removeprefix("-e ").strip()
    folder = Path(editable).resolve() if editable.startswith((".", "/")) else None
    return distribution_name(PluginSpec(name=name, env_name=name, package=editable, folder=folder))


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was taken away: ``kept`` says why the environment was not, an empty text that it was."""

    environment: Path | None
    kept: str = ""


def remove_plugin(data_dir: Path, name: str, *, keep_environment: bool = False) -> Removal:
    """Take a plugin's manifest away, and its environment where that is the installer's and nobody else's.

    What the plugin wrote, its secrets and its kept configuration stay.
    """
    file = manifest_file(data_dir, name)
    with installing(data_dir / "envs"):
        folder = _environment_of(data_dir, file)
        others = [other for other in (data_dir / "manifests").glob("*.json") if other != file]
        sharing = [other.stem for other in others if folder and _environment_of(data_dir, other) == folder]
        file.unlink()
        if folder is None:
            return Removal(environment=None, kept="it is not one that cjm-ctl made")
        (folder / ".cjm" / f"{name}.stamp").unlink(missing_ok=True)
        if keep_environment or sharing:
            kept = f"{', '.join(sorted(sharing))} uses it too" if sharing else "as asked"
            return Removal(environment=folder, kept=kept)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            return Removal(environment=folder, kept=f"it cannot be removed: {error}")
    return Removal(environment=folder)


def environment_of(data_dir: Path, name: str) -> Path | None:
    """Return the environment that the installer made for a plugin, None when there is none."""
    try:
        return _environment_of(data_dir, manifest_file(data_dir, name))
    except PluginConfigError:
        return None


def _environment_of(data_dir: Path, file: Path) -> Path | None:
    try:
        python = Path(load_manifest(file).install.python_path)
    except ManifestError:
        return None
    envs = data_dir.resolve() / "envs"
    folder = python.parent.parent
    return folder if folder.parent == envs and folder.is_dir() else None


def disk_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk; a file that is linked into it from several places counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            found = Path(place, name).lstat()
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_blocks * 512
    return total
