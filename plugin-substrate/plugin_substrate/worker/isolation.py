"""What a plugin may do, as data: what it asks for, what the operator grants, and the profile that comes of both.

The JSON form is an object with the fields' names as keys, in a manifest, in ``plugins.yaml`` and in the message that
spawns a worker. Reading one checks every field; what is wrong is named, all of it, and nothing is half-used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.records import record

MAX_PATHS = 64
_MAX_PATH_CHARACTERS = 4096
_MAX_NUMBER = (1 << 63) - 1  # what a resource limit can hold
_REQUIRED_LAYER = re.compile(r"([a-z_]+)(?::([0-9]{1,6}))?")

#: The layers that a worker can report, and what each keeps a plugin from. A number after a colon is its version.
LAYERS: Mapping[str, str] = {
    "bubblewrap": "seeing names, sizes and times of files that it may not open",
    "capabilities_dropped": "using Linux capabilities, though the host may run as root",
    "cgroup": "leaving processes behind when its supervisor is killed: the host then ends them all at once",
    "clean_environment": "reading the host's environment variables in its own",
    "closed_descriptors": "using files and sockets that the host has open",
    "descendants_swept": "leaving processes behind for long: instead of pid_namespace and cgroup, at best effort",
    "disk_sampled": "keeping more in its folder than granted, for long",
    "landlock": "reading and writing files that are not listed; from version 4 TCP, from version 6 signals too",
    "memory_sampled": "keeping more resident memory than granted, all its processes together, for long",
    "new_session": "sharing a terminal or a process group with the host",
    "no_new_privs": "gaining rights from set-id programs",
    "not_dumpable": "being read by other processes of the same user, and leaving core files",
    "own_uid": "acting as the host's user, or as another plugin's",
    "parent_death_signal": "outliving its supervisor",
    "pid_namespace": "leaving processes behind, and seeing or signalling those of others",
    "rlimits": "more open files, larger files, more processor time or more private memory than granted",
    "seccomp": "sockets, processes, tracing and the rarer system calls that it was not granted",
    "umask": "making files that other users can read",
}


@record(kw_only=True)
class IsolationProfile:
    """What one worker may do. The defaults are what a plugin gets that asks for nothing.

    Paths are absolute and stand for themselves and all below; its own data folder, its environment and what the system
    gives to everyone need not be named. ``file_names`` lets it see names, sizes and times of files that it may not
    open. Sizes are bytes. ``processes`` counts those beside the worker, all generations together; ``memory_bytes`` is
    resident memory of all of them together. ``file_bytes`` bounds each file, and ``disk_bytes`` all that its own folder
    holds, with what earlier workers left there.
    """

    network: bool = False
    processes: int = 0
    read_paths: tuple[str, ...] = ()
    write_paths: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    file_names: bool = False
    memory_bytes: int = 2 << 30
    cpu_seconds: int | None = None
    open_files: int = 1024
    file_bytes: int = 4 << 30
    disk_bytes: int = 16 << 30

    @classmethod
    def from_json(cls, data: object) -> IsolationProfile:
        """Read a whole profile; a `PluginConfigError` names everything wrong with it."""
        problems: list[str] = []
        terms = parse_terms(data, "isolation", problems, most_paths=2 * MAX_PATHS)
        if problems:
            raise PluginConfigError("; ".join(problems))
        return cls(**terms.said())


@record(kw_only=True)
class IsolationTerms:
    """What a plugin asks for, or an operator grants; None where nothing is said. Fields as in `IsolationProfile`."""

    network: bool | None = None
    processes: int | None = None
    read_paths: tuple[str, ...] | None = None
    write_paths: tuple[str, ...] | None = None
    devices: tuple[str, ...] | None = None
    file_names: bool | None = None
    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    open_files: int | None = None
    file_bytes: int | None = None
    disk_bytes: int | None = None

    def said(self) -> dict[str, Any]:
        """Return the fields that something is said about."""
        return {name: value for name, value in vars(self).items() if value is not None}


def profile_to_json(profile: IsolationProfile | IsolationTerms) -> dict[str, Any]:
    """Return the JSON form; what is not said or not limited is left out."""
    values = {name: value for name, value in vars(profile).items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse_terms(data: object, place: str, problems: list[str], *, most_paths: int = MAX_PATHS) -> IsolationTerms:
    """Check a decoded JSON value; every violation is added to ``problems``, with ``place`` as the name of the whole."""
    if not isinstance(data, dict):
        problems.append(f"{place} must be an object, not {data!r:.80}")
        return IsolationTerms()
    known = _CHECKS.keys()
    problems += [f"unknown key {f'{place}.{key}'!r:.120}" for key in data if key not in known]
    values: dict[str, Any] = {}
    for name in sorted(known & data.keys()):
        wanted = _CHECKS[name](data[name])
        if isinstance(data[name], list) and len(data[name]) > most_paths:
            wanted = f"a list of at most {most_paths} paths"
        if wanted:
            problems.append(f"{place}.{name} must be {wanted}, not {data[name]!r:.80}")
        else:
            values[name] = tuple(data[name]) if isinstance(data[name], list) else data[name]
    return IsolationTerms(**values)


def parse_required_layers(data: object, place: str, problems: list[str]) -> tuple[str, ...]:
    """Check a list of layers, like ``["seccomp", "landlock:4"]``; violations are added to ``problems``."""
    if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
        problems.append(f"{place} must be a list of layers, not {data!r:.80}")
        return ()
    for item in data:
        match = _REQUIRED_LAYER.fullmatch(item)
        if match is None or match[1] not in LAYERS:
            problems.append(f"{place}: {item!r:.80} is no layer; known: {', '.join(LAYERS)}")
    return tuple(data)


def missing_layers(required: Iterable[str], held: Iterable[str]) -> tuple[str, ...]:
    """Return what is required and not held; a number after a colon is the least version that will do."""
    versions = {name: int(number or 0) for name, _, number in (layer.partition(":") for layer in held)}
    wanted = [(layer, *layer.partition(":")[::2]) for layer in required]
    return tuple(layer for layer, name, least in wanted if versions.get(name, -1) < int(least or 0))


def resolve_profile(
    plugin_name: str, asked: IsolationTerms, granted: IsolationTerms, default: IsolationProfile
) -> IsolationProfile:
    """Return what a plugin gets: what it asks for, else what is granted, else the default; of paths all granted ones.

    Asking for more than is granted, or than the default where nothing is granted, is a `PluginConfigError` that names
    the grants that are missing.
    """
    bounds: dict[str, Any] = {**vars(default), **granted.said()}
    lacking = {name: value for name, value in asked.said().items() if _exceeds(value, bounds[name])}
    if lacking:
        grants = ", ".join(f"{name}: {_shown(value)}" for name, value in lacking.items())
        raise PluginConfigError(
            f"plugin {plugin_name!r} asks for more than it is granted; grant it under `isolation:` of the plugin in "
            f"plugins.yaml and run cjm-ctl install-all, or do without the plugin: {grants}",
            fields_invalid=[f"isolation.{name}" for name in lacking],
        )
    chosen = {name: value for name, value in asked.said().items() if not isinstance(value, tuple)}
    return IsolationProfile(**{**bounds, **chosen})


def _exceeds(asked: Any, bound: Any) -> bool:
    if isinstance(asked, tuple):
        return not all(any(_is_below(path, granted) for granted in bound) for path in asked)
    return bound is not None and asked > bound


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def _not_bool(value: object) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _number_check(least: int, most: int) -> Callable[[object], str]:
    def check(value: object) -> str:
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return "" if fits else f"a whole number from {least} to {most}"

    return check


def _path_check(below: str) -> Callable[[object], str]:
    def fits(path: object) -> bool:
        if not isinstance(path, str) or len(path) > _MAX_PATH_CHARACTERS or not path.isprintable():
            return False
        return path.startswith(below) and path != below and path == os.path.normpath(path) and path[:2] != "//"

    def check(value: object) -> str:
        good = isinstance(value, list) and all(fits(path) for path in value)
        return "" if good else f"a list of normal paths below {below}"

    return check


_CHECKS: Mapping[str, Callable[[object], str]] = {
    "network": _not_bool,
    "processes": _number_check(0, 10_000),
    "read_paths": _path_check("/"),
    "write_paths": _path_check("/"),
    "devices": _path_check("/dev/"),
    "file_names": _not_bool,
    "memory_bytes": _number_check(64 << 20, _MAX_NUMBER),
    "cpu_seconds": _number_check(1, _MAX_NUMBER),
    "open_files": _number_check(32, 1 << 20),
    "file_bytes": _number_check(0, _MAX_NUMBER),
    "disk_bytes": _number_check(1 << 20, _MAX_NUMBER),
}
