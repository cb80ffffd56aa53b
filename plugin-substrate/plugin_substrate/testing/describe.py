"""Describes a plugin class of the test's own environment as if it were installed: no package, no build, no index."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugin_substrate.interface import PluginInterface, collect_plugin_actions
from plugin_substrate.manifest import FORMAT_VERSION, compute_config_schema_hash, parse_manifest
from plugin_substrate.metadata import PluginMeta

_INTERFACE = f"{PluginInterface.__module__}.{PluginInterface.__name__}"


def plugin_meta(
    plugin: type[PluginInterface] | Mapping[str, Any] | str,
    *,
    environments: Path,
    place: Path | None = None,
    isolation: Mapping[str, Any] | None = None,
    **code: Any,
) -> PluginMeta:
    """Return what installing a plugin would have written, with what it asks for in ``isolation`` granted.

    ``plugin`` is what its ``get_plugin_metadata()`` returns; or the class, whose actions and schema it then has; or
    ``"module:Class"`` of one that this process had better not import. ``place`` is the folder of a module that is not
    on this process's path. The module must import nothing of this package but `plugin_substrate.interface` and
    `.errors`: nothing else is there in a worker. ``environments`` is where the small virtual environments go that
    workers run in; those that are there are used again. Further keywords are keys of the metadata. What breaks the
    rules of a manifest is a `ManifestError`.
    """
    where, described = _described(plugin, place)
    described |= code
    if isolation is not None:
        described["isolation"] = dict(isolation)
    digest = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    python = environment_of_this_process(environments / digest, first=where)
    data = {
        "format_version": FORMAT_VERSION,
        "install": {
            "python_path": str(python),
            "source_paths": list(map(str, (where, *_folders_of_this_process()))),
        },
        "code": described,
        "drift_tracking": {"config_schema_hash": compute_config_schema_hash(described.get("config_schema"))},
        "overrides": {"isolation": described.get("isolation") or {}},
    }
    return PluginMeta(manifest=parse_manifest(data, source=str(described["name"])))


def environment_of_this_process(folder: Path, *, first: Path) -> Path:
    """Make a virtual environment at ``folder`` and return its interpreter; one that is there already is used again.

    What is in ``first`` can be imported in it, and what this process finds on ``sys.path``.
    """
    python = folder / "bin" / "python"
    if python.exists():
        return python
    venv.EnvBuilder(symlinks=True).create(folder)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    lines = [str(first), *map(_path_line, _folders_of_this_process())]
    (site_packages / "of_the_test.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


def _folders_of_this_process() -> list[Path]:
    return [Path(entry).absolute() for entry in sys.path if entry and Path(entry).is_dir()]


def _described(
    plugin: type[PluginInterface] | Mapping[str, Any] | str, place: Path | None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder to import a plugin from, and its metadata."""
    if isinstance(plugin, Mapping):
        return place or _folder_of_module(str(plugin.get("module"))), {"name": "", **plugin}
    if isinstance(plugin, str):
        module, _, class_name = plugin.partition(":")
        return place or _folder_of_module(module), _metadata(module, class_name)
    folder, module = _place_of_class(plugin)
    facts = {"capabilities": sorted(collect_plugin_actions(plugin)), "config_schema": _schema_of(plugin)}
    return place or folder, {**_metadata(module, plugin.__name__), **facts}


def _metadata(module: str, class_name: str) -> dict[str, Any]:
    return {
        "name": class_name,
        "version": "0",
        "description": class_name,
        "module": module,
        "class": class_name,
        "interface": _INTERFACE,
    }


def _schema_of(plugin: type[PluginInterface]) -> dict[str, Any] | None:
    try:
        return plugin().get_config_schema()
    except Exception:  # noqa: BLE001 - a plugin that cannot be created is what loading it will show
        return None


def _place_of_class(plugin: type[PluginInterface]) -> tuple[Path, str]:
    """Return the folder to import a class from, and the name of its module there.

    A class in a test file is imported from that file's folder, whatever name the test runner gave to the module; so is
    one of this package, of which a worker sees no more than any plugin may.
    """
    file = Path(inspect.getfile(plugin)).resolve()
    parts = plugin.__module__.split(".")
    as_path = (*parts, "__init__.py") if file.name == "__init__.py" else (*parts[:-1], f"{parts[-1]}.py")
    root = Path(*file.parts[: len(file.parts) - len(as_path)])
    importable = parts[0] != "plugin_substrate" and all(part.isidentifier() for part in parts)
    if importable and file == root.joinpath(*as_path):
        return root, plugin.__module__
    return file.parent, file.stem


def _folder_of_module(module: str) -> Path:
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module!r} on this process's path; say where it lies with place=")
    return Path(spec.origin).parent


def _path_line(entry: Path) -> str:
    """A line of a ``.pth`` file: folders with such files of their own are read in full, as editable installs are."""
    if any(entry.glob("*.pth")):
        return f"import site; site.addsitedir({str(entry)!r})"
    return str(entry)
