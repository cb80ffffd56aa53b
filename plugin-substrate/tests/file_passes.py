"""File plugins written by tests, the tree they work on, and a pass over it."""

from __future__ import annotations

import os
import stat
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from plugin_substrate.passes import (
    InputRequiredPayload,
    PluginContext,
    PluginHost,
    PluginPassResult,
    PluginRegistry,
    ProtectedPaths,
)

# The values of the system whose plugins and records these are.
REFERENCE = ProtectedPaths(
    names=frozenset({"README.md", "README.md.jinja", ".exlab-answers.yml"}), folders=frozenset({".exlab-wizard"})
)
FATAL = "_exlab_plugins_fatal"

Snapshot = dict[str, tuple[Any, ...]]
Write = Callable[..., Path]


def make_tree(root: Path) -> Path:
    """A folder with some of everything."""
    (root / "sub").mkdir(parents=True)
    (root / ".exlab-wizard").mkdir()
    for number in range(4):
        (root / "sub" / f"{number}.txt").write_text(f"text {number}\n")
    (root / "script.sh").write_text("#!/bin/sh\n")
    (root / "script.sh").chmod(0o750)
    (root / "README.md").write_text("read me\n")
    (root / ".exlab-answers.yml").write_text("answers: {}\n")
    (root / ".exlab-wizard" / "creation.json").write_text("{}\n")
    (root / "link").symlink_to("sub/1.txt")
    os.link(root / "sub" / "2.txt", root / "second-name.dat")
    os.mkfifo(root / "pipe")
    return root


def write_plugin(
    packages: Path, name: str = "editor", *, manifest: str = "", extensions: str = "[.txt]", **methods: str
) -> Path:
    """Make a plugin of the bodies of its methods."""
    folder = packages / name.replace("-", "_")
    folder.mkdir()
    (folder / "manifest.yml").write_text(
        f"name: {name}\nversion: '1.0'\nsupported_extensions: {extensions}\napi_version: '1'\n{manifest}\n"
    )
    arguments = {
        "can_handle": "self, path, variables",
        "transform": "self, path, ctx",
        "describe_changes": "self, path, ctx",
        "pre_transform_all": "self, ctx",
        "post_transform_all": "self, ctx",
        "on_plugin_failure": "self, exc, ctx",
        "validate_variables": "self, variables",
    }
    bodies = {"can_handle": "return True", "transform": "pass", **methods}
    code = [
        "import json, os, socket, sys, time",
        "from pathlib import Path",
        "from plugin_substrate.file_plugin import FileChange, FilePlugin, PluginError, PluginInputRequired",
        "class Plugin(FilePlugin):",
        f"    name, version, supported_extensions = {name!r}, '1.0', {extensions.strip('[]').split(', ')!r}",
    ]
    for method, body in bodies.items():
        code += [f"    def {method}({arguments[method]}):", textwrap.indent(textwrap.dedent(body), " " * 8)]
    (folder / "__init__.py").write_text("\n".join(code))
    return folder


def snapshot(root: Path) -> Snapshot:
    """Every path with kind, permissions, content or target, link count and inode."""
    found: Snapshot = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = b""
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink()).encode()
        links = 0 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        found[str(path.relative_to(root))] = (status.st_mode, links, status.st_ino, content)
    return found


async def never(question: InputRequiredPayload) -> None:
    raise AssertionError(question)


async def run(
    packages: Path,
    tree: Path,
    order: Iterable[str] = ("editor",),
    *,
    ask: Any = never,
    variables: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    files: Iterable[str] | None = None,
    **options: Any,
) -> PluginPassResult:
    context = PluginContext(variables=variables or {}, dst_root=tree, dry_run=dry_run, project="p 1")
    host = PluginHost(PluginRegistry(packages), protected=REFERENCE, fatal_variable=FATAL, **options)
    names = [f"sub/{number}.txt" for number in range(4)] if files is None else list(files)
    return await host.run_pass(context, names, list(order), ask)


async def one(packages: Path, tree: Path, **options: Any) -> dict[str, Any]:
    result = await run(packages, tree, **options)
    assert len(result.applied) == 1
    return result.applied[0]
