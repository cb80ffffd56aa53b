"""What a file plugin's manifest says, read without importing anything and refused for whatever is wrong with it."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from plugin_substrate.passes.records import PluginRecord
from plugin_substrate.worker.text import clean_line

__all__ = [
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "MAX_MEMORY_MB",
    "MAX_TIMEOUT_SECONDS",
    "RejectedError",
    "load_record",
]

MANIFEST_NAME = "manifest.yml"
MAX_MANIFEST_BYTES = 64 << 10
MAX_TIMEOUT_SECONDS = 300
MAX_MEMORY_MB = 2048

_MAX_DEPTH = 8
_MAX_TEXT = 80
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REQUIRED = ("name", "version", "supported_extensions", "api_version")


class RejectedError(ValueError):
    """Why a package is not taken."""


def load_record(
    package: Path, *, supported_api_versions: Iterable[str] = ("1",), allow_network: bool = False
) -> PluginRecord:
    """Read one package's manifest; a `RejectedError` says why it cannot be taken."""
    data = _manifest(package)
    for key in _REQUIRED:
        if data.get(key) in (None, ""):
            raise RejectedError(f"missing required field {key!r}")
    name, version, api_version = (_text(data, key) for key in ("name", "version", "api_version"))
    if not _NAME.fullmatch(name):
        raise RejectedError(f"invalid name {name!r:.80}")
    if package.name in sys.stdlib_module_names:
        raise RejectedError(f"its folder {package.name!r} is named like a module of the standard library")
    if api_version not in frozenset(supported_api_versions):
        raise RejectedError(f"unsupported api_version {api_version!r:.80}")
    extensions = _texts(data, "supported_extensions")
    for key in ("required_variables", "optional_variables"):
        _texts(data, key)
    for key in ("author", "description"):
        if not isinstance(data.get(key, ""), str):
            raise RejectedError(f"{key} must be a text, not {_shown(data[key])}")
    if not (package / "__init__.py").is_file():
        raise RejectedError("missing __init__.py")
    isolation = _isolation(data, allow_network=allow_network)
    return PluginRecord(
        name=name,
        version=version,
        package_path=package,
        module_name=package.name,
        timeout_seconds=_number(isolation, "timeout_seconds", 30, MAX_TIMEOUT_SECONDS),
        memory_mb=_number(isolation, "memory_mb", 512, MAX_MEMORY_MB),
        supported_extensions=extensions,
        api_version=api_version,
        network=isolation.get("network", False),
    )


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise RejectedError(f"{key} must be a list of strings")
    return tuple(value)


def _isolation(data: Mapping[str, Any], *, allow_network: bool) -> Mapping[str, Any]:
    isolation = data.get("isolation", {})
    if not isinstance(isolation, dict):
        raise RejectedError("isolation block must be a mapping")
    network = isolation.get("network", False)
    if not isinstance(network, bool):
        raise RejectedError(f"isolation.network must be true or false, not {_shown(network)}")
    if network and not allow_network:
        raise RejectedError("network declared but plugins.allow_network=false")
    return isolation


def _manifest(package: Path) -> dict[str, Any]:
    """Read the file without following a link, whatever somebody put in its place."""
    if package.is_symlink():
        raise RejectedError("malformed manifest: its folder is a symbolic link")
    try:
        descriptor = os.open(package / MANIFEST_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RejectedError(f"missing {MANIFEST_NAME}") from None
    except OSError as error:
        raise RejectedError(f"malformed manifest: it cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RejectedError("malformed manifest: it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise RejectedError(f"malformed manifest: it is larger than {MAX_MANIFEST_BYTES} bytes")
    data = _parse(raw)
    if not isinstance(data, dict):
        raise RejectedError("malformed manifest: it is no mapping")
    return data


def _parse(raw: bytes) -> Any:
    """Return what a manifest says."""
    try:
        text = raw.decode("utf-8")
        _refuse_traps(text)
        return yaml.load(text, Loader=_OnceLoader)  # noqa: S506 - a SafeLoader that refuses doubled keys
    except RejectedError:
        raise
    except UnicodeDecodeError:
        raise RejectedError("malformed manifest: it is not UTF-8") from None
    except yaml.YAMLError as error:
        raise RejectedError(f"malformed manifest: {clean_line(str(error).partition(chr(10))[0], 200)}") from error
    except Exception as error:  # a value that is not what its tag says is whatever PyYAML happens to stumble over
        raise RejectedError(f"malformed manifest: a value cannot be read ({type(error).__name__})") from error


def _refuse_traps(text: str) -> None:
    """Refuse what takes hours or gigabytes to read, in a few lines: aliases, and depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise RejectedError("malformed manifest: it uses aliases")
        if depth > _MAX_DEPTH:
            raise RejectedError(f"malformed manifest: it is nested more than {_MAX_DEPTH} deep")


class _OnceLoader(yaml.SafeLoader):
    """A SafeLoader to which a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError("a key is given twice")
        return mapping


def _shown(value: object) -> str:
    """Return a value as a reason shows it: Python writes no number of more digits than it reads."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number without end"


def _text(data: Mapping[str, Any], key: str) -> str:
    """Return a text, or a number as text: a version like 1.0 is written without quotes."""
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise RejectedError(f"{key} must be a text, not {_shown(value)}")
    text = value if isinstance(value, str) else _shown(value)
    if not text.isprintable() or len(text) > _MAX_TEXT:
        raise RejectedError(f"{key} must be one printable line of at most {_MAX_TEXT} characters, not {_shown(value)}")
    return text


def _number(isolation: Mapping[str, Any], key: str, default: int, cap: int) -> int:
    value = isolation.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RejectedError(f"isolation.{key} must be a whole number, not {_shown(value)}")
    if value > cap:
        raise RejectedError(f"isolation.{key}={_shown(value)} exceeds cap {cap}")
    return max(1, value)
