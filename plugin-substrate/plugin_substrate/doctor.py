"""What this machine offers to confine plugins with, and what each installed plugin asks for, is granted and gets.

What a plugin gets is found by starting a worker for it, confined as always, and asking; its own code is never loaded.
"""

from __future__ import annotations

import asyncio
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugin_substrate import control_group
from plugin_substrate.discovery import find_manifests, manifest_folders
from plugin_substrate.errors import PluginError
from plugin_substrate.lifecycle import Supervisor, bubblewrap_program
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker import bubblewrap, confine, landlock, namespaces, own_user, seccomp
from plugin_substrate.worker.isolation import LAYERS, IsolationProfile, missing_layers, profile_to_json
from plugin_substrate.worker.mount_view import view_of
from plugin_substrate.worker_folder import prepare_folder, worker_environment

_SECONDS = 30.0
_LANDLOCK_ADDS = {2: "renames between folders", 3: "truncating", 4: "TCP", 5: "device commands", 6: "signals"}


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer of this machine: whether a worker can hold it, and in which form, or why it cannot."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class PluginReport:
    """One installed plugin. ``problem`` says why it would not be loaded, and is empty when it would.

    ``lacks`` are layers that its worker was to have and could not be given, with the reasons.
    """

    name: str
    asked: dict[str, Any]
    granted: dict[str, Any]
    profile: dict[str, Any]
    required: tuple[str, ...]
    layers: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that was found. ``rejected`` are manifests that cannot be used, with their reasons."""

    layers: tuple[LayerReport, ...]
    plugins: tuple[PluginReport, ...]
    rejected: tuple[tuple[Path, str], ...]

    @property
    def well(self) -> bool:
        """Whether every installed plugin would be loaded, with all that is required of its confinement."""
        return not self.rejected and not any(plugin.problem for plugin in self.plugins)


async def diagnose(data_dir: Path, default: IsolationProfile) -> Diagnosis:
    """Look at this machine and at the plugins installed below ``data_dir``; ``default`` is what a host gives them.

    ``data_dir`` is an absolute path.
    """
    found, rejected = find_manifests(manifest_folders(data_dir))
    plugins = [await _plugin(meta, data_dir, default) for meta in found]
    return Diagnosis(
        layers=tuple(machine_layers({layer for plugin in plugins for layer in plugin.layers})),
        plugins=tuple(plugins),
        rejected=tuple((bad.path, bad.reason) for bad in rejected),
    )


def machine_layers(seen: set[str] | None = None) -> list[LayerReport]:
    """Return every layer, held or not; ``seen`` are those that a worker was found to hold."""
    abi = landlock.kernel_abi()
    absent = {
        "bubblewrap": _bubblewrap_reason(seen or set()),
        "landlock": "" if abi else "the kernel has no Landlock, or does not list it in /sys/kernel/security/lsm",
        "seccomp": "" if seccomp.supported() else f"no filter is written for {platform.machine()}",
        "pid_namespace": _namespace_reason(),
        "cgroup": _group_reason(),
        "own_uid": _own_uid_reason(seen or set()),
    }
    if platform.system() != "Linux":
        always = {"clean_environment", "closed_descriptors", "new_session", "rlimits", "umask"}
        absent = {name: f"not on {platform.system()}" for name in LAYERS if name not in always}
    return [
        LayerReport(
            name=f"landlock:{min(abi, landlock.HIGHEST_ABI)}" if name == "landlock" and abi else name,
            held=not absent.get(name),
            detail=absent.get(name) or _detail(name, abi, stops),
        )
        for name, stops in LAYERS.items()
    ]


def _detail(name: str, abi: int, stops: str) -> str:
    if name == "bubblewrap":
        return f"{stops}; unless `file_names` is granted"
    if name in ("pid_namespace", "cgroup", "descendants_swept"):
        also = "" if name == "pid_namespace" else ", and for those that preload"
        return f"{stops}; for plugins that may have processes{also}"
    missing = [what for since, what in _LANDLOCK_ADDS.items() if abi < since] if name == "landlock" else []
    return f"{stops}; this kernel's does not cover {', '.join(missing)}" if missing else stops


def _bubblewrap_reason(seen: set[str]) -> str:
    """Try it as a supervisor does, with what a plugin of this interpreter may open that is granted nothing."""
    program = bubblewrap_program()
    if program is None:
        return "no folder of PATH has a program bwrap; the package is called bubblewrap"
    if "bubblewrap" in seen:
        return ""
    rules = confine.file_rules(confine.make_plan(IsolationProfile()), tempfile.gettempdir())
    return bubblewrap.reason_against(program, view_of(rules))


def _namespace_reason() -> str:
    if platform.system() == "Linux" and namespaces.available():
        return ""
    return "this system does not let us make one; what a plugin's processes leave behind is swept at the next contact"


def _group_reason() -> str:
    folder = control_group.own_folder()
    if folder is None:
        return "this system has no control groups of version 2 here"
    return "" if control_group.usable() else f"we may make no group in {folder}, or the kernel is older than 5.14"


def _own_uid_reason(seen: set[str]) -> str:
    if any(layer.startswith("own_uid") for layer in seen):
        return ""
    if not own_user.may_change_user():
        return "only a host that runs as root can give a plugin another user"
    return "no plugin's user could reach its interpreter, its environment and its folder; permissions are never changed"


async def _plugin(meta: PluginMeta, data_dir: Path, default: IsolationProfile) -> PluginReport:
    manifest = meta.manifest
    facts: dict[str, Any] = {
        "name": meta.name,
        "asked": profile_to_json(manifest.asked_isolation),
        "granted": profile_to_json(manifest.granted_isolation),
        "required": manifest.required_layers,
    }
    try:
        profile = manifest.isolation_profile(default)
    except PluginError as error:
        return PluginReport(**facts, profile={}, problem=str(error))
    facts["profile"] = profile_to_json(profile)
    try:
        layers, lacks = await asyncio.wait_for(_layers_of(meta, data_dir, profile), _SECONDS)
    except (PluginError, OSError, TimeoutError) as error:
        return PluginReport(**facts, problem=f"no worker can be started: {error or 'it did not answer'}")
    return PluginReport(**facts, layers=layers, lacks=lacks, problem=_lack(manifest.required_layers, layers))


def _lack(required: Sequence[str], layers: Sequence[str]) -> str:
    missing = missing_layers(required, layers)
    return f"required but not in force here: {', '.join(missing)}" if missing else ""


async def _layers_of(
    meta: PluginMeta, data_dir: Path, profile: IsolationProfile
) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Start a worker as for a call, in a folder that nobody uses, and end it when it has said what confines it.

    Returns that, and the layers that it could not be given, with the reasons.
    """
    python = meta.manifest.install.python_path
    folder = data_dir / "data" / meta.name / "doctor"
    prepare_folder(folder)
    supervisor = Supervisor(python, meta.name)
    try:
        environment = worker_environment(python, folder, {}, keeps_data=True)
        process = await supervisor.spawn(env=environment, cwd=folder, isolation=profile, template=meta.preload)
        proxy = RemotePluginProxy(process)
        try:
            await proxy.require(["rlimits"])
            return proxy.layers, supervisor.lacks
        finally:
            await proxy.kill()
    finally:
        await supervisor.close()
        shutil.rmtree(folder, ignore_errors=True)
