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
from plugin_substrate.manifest import CodeSection, InstallSection, ManifestV2
from plugin_substrate.metadata import PluginMeta

_INTERFACE = f"{PluginInterface.__module__}.{PluginInterface.__name__}"


def plugin_meta(
    plugin: type[PluginInterface] | str,
    *,
    environments: Path,
    place: Path | None = None,
    name: str = "",
    isolation: Mapping[str, Any] | None = None,
    **code: Any,
) -> PluginMeta:
    """Return what installing a plugin would have written, with ``isolation`` both asked for and granted.

    ``plugin`` is the class, or ``"module:Class"`` of one that this process had better not import, in the folder
    ``place`` where it is not on this process's path. Its module must import nothing of this package but
    `plugin_substrate.interface` and `.errors`: nothing else is there in a worker. ``environments`` is where the small
    virtual environments go that workers run in; those that are there are used again. Further keywords are fields of the
    manifest's code section.
    """
    where, module, class_name = _place_of(plugin, place)
    digest = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    python = environment_of_this_process(environments / digest, first=where)
    described: dict[str, Any] = {"version": "0", "description": class_name, **code}
    if isinstance(plugin, type):
        described.setdefault("capabilities", tuple(sorted(collect_plugin_actions(plugin))))
    section = CodeSection(
        name=name or class_name,
        module=module,
        class_name=class_name,
        interface=_INTERFACE,
        isolation=dict(isolation) if isolation else None,
        **described,
    )
    overrides = {"isolation": dict(isolation)} if isolation else {}
    sources = tuple(map(str, (where, *_folders_of_this_process())))
    install = InstallSection(python_path=str(python), source_paths=sources)
    manifest = ManifestV2(install=install, code=section, overrides=overrides)
    return PluginMeta(manifest=manifest)


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


def _place_of(plugin: type[PluginInterface] | str, place: Path | None) -> tuple[Path, str, str]:
    """Return the folder to import a class from, the name of its module there, and its own.

    A class in a test file is imported from that file's folder, whatever name the test runner gave to the module; so is
    one of this package, of which a worker sees no more than any plugin may.
    """
    if isinstance(plugin, str):
        module, _, class_name = plugin.partition(":")
        return place or _folder_of_module(module), module, class_name
    file = Path(inspect.getfile(plugin)).resolve()
    parts = plugin.__module__.split(".")
    as_path = (*parts, "__init__.py") if file.name == "__init__.py" else (*parts[:-1], f"{parts[-1]}.py")
    root = Path(*file.parts[: len(file.parts) - len(as_path)])
    importable = parts[0] != "plugin_substrate" and all(part.isidentifier() for part in parts)
    if importable and file == root.joinpath(*as_path):
        return root, plugin.__module__, plugin.__name__
    return file.parent, file.stem, plugin.__name__


def _folder_of_module(module: str) -> Path:
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module!r} on this process's path; say where it lies with place=")
    origin = Path(spec.origin)
    return origin.parent.parent if origin.name == "__init__.py" else origin.parent


def _path_line(entry: Path) -> str:
    """A line of a ``.pth`` file: folders with such files of their own are read in full, as editable installs are."""
    if any(entry.glob("*.pth")):
        return f"import site; site.addsitedir({str(entry)!r})"
    return str(entry)
