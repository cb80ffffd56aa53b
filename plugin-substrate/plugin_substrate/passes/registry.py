"""Which file plugins there are: packages below two folders, read without importing any of them."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plugin_substrate.passes.records import PluginRecord
from plugin_substrate.worker.text import clean_line

__all__ = ["PluginRegistry", "RegistryReport", "load_record"]

MANIFEST_NAME = "manifest.yml"
MAX_MANIFEST_BYTES = 64 << 10
MAX_TIMEOUT_SECONDS = 300
MAX_MEMORY_MB = 2048

_MAX_DEPTH = 8
_MAX_TEXT = 80
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REQUIRED = ("name", "version", "supported_extensions", "api_version")
_logger = logging.getLogger(__name__)


class _Rejected(ValueError):
    """Why a package is not taken."""


@dataclass(frozen=True, kw_only=True)
class RegistryReport:
    """What a reload found: the names that were taken, and why each other folder was not."""

    loaded: tuple[str, ...] = ()
    rejected: Mapping[Path, str] = field(default_factory=dict)


class PluginRegistry:
    """The plugins of the bundled folder and of the laboratory's own, which replace bundled ones of the same name.

    A package that breaks a rule is rejected alone, with its reason; a rejected one of the laboratory leaves the bundled
    one in force. Of two in one folder with the same name, the second in the order of folder names is rejected.
    """

    def __init__(
        self,
        bundled_dir: Path,
        lab_dir: Path | None = None,
        *,
        supported_api_versions: Iterable[str] = ("1",),
        allow_network: bool = False,
    ) -> None:
        self._roots = [root for root in (bundled_dir, lab_dir) if root is not None]
        self._api_versions = frozenset(supported_api_versions)
        self._allow_network = allow_network
        self._records: dict[str, PluginRecord] = {}
        self.reload()

    def reload(self) -> RegistryReport:
        """Read both folders anew."""
        records: dict[str, PluginRecord] = {}
        rejected: dict[Path, str] = {}
        for root in self._roots:
            of_root: dict[str, PluginRecord] = {}
            for package in _packages(root):
                try:
                    record = load_record(
                        package, supported_api_versions=self._api_versions, allow_network=self._allow_network
                    )
                    if record.name in of_root:
                        other = of_root[record.name].package_path.name
                        raise _Rejected(f"duplicate name {record.name!r}: {other} has it already")  # noqa: TRY301
                except _Rejected as reason:
                    rejected[package] = str(reason)
                    _logger.warning(
                        "a plugin package is rejected", extra={"package": str(package), "reason": str(reason)}
                    )
                    continue
                of_root[record.name] = record
            for name in records.keys() & of_root.keys():
                _logger.info("a plugin of the laboratory replaces the bundled one", extra={"plugin": name})
            records |= of_root
        self._records = dict(sorted(records.items()))
        return RegistryReport(loaded=tuple(self._records), rejected=rejected)

    def get_record(self, name: str) -> PluginRecord | None:
        """Return the plugin of this name, None when there is none."""
        return self._records.get(name)

    get = get_record

    def list_all(self) -> list[PluginRecord]:
        """Return every plugin, by name."""
        return list(self._records.values())

    def candidates_for(self, files: Iterable[str | Path]) -> dict[str, tuple[str, ...]]:
        """Return which plugins would be given which of these files, by plugin name."""
        names = [Path(file).as_posix() for file in files]
        plans = {record.name: tuple(filter(record.supports, names)) for record in self._records.values()}
        return {name: matching for name, matching in plans.items() if matching}


def load_record(
    package: Path, *, supported_api_versions: Iterable[str] = ("1",), allow_network: bool = False
) -> PluginRecord:
    """Read one package's manifest; a ValueError says why it cannot be taken."""
    data = _manifest(package)
    for key in _REQUIRED:
        if data.get(key) in (None, ""):
            raise _Rejected(f"missing required field {key!r}")
    name, version, api_version = (_text(data, key) for key in ("name", "version", "api_version"))
    if not _NAME.fullmatch(name):
        raise _Rejected(f"invalid name {name!r:.80}")
    if package.name in sys.stdlib_module_names:
        raise _Rejected(f"its folder {package.name!r} is named like a module of the standard library")
    if api_version not in frozenset(supported_api_versions):
        raise _Rejected(f"unsupported api_version {api_version!r:.80}")
    extensions = data["supported_extensions"]
    if not isinstance(extensions, list) or not all(isinstance(entry, str) and entry for entry in extensions):
        raise _Rejected("supported_extensions must be a list of strings")
    for key in ("required_variables", "optional_variables"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(entry, str) for entry in data.get(key, [])):
            raise _Rejected(f"{key} must be a list of strings")
    if not (package / "__init__.py").is_file():
        raise _Rejected("missing __init__.py")
    isolation = data.get("isolation", {})
    if not isinstance(isolation, dict):
        raise _Rejected("isolation block must be a mapping")
    network = isolation.get("network", False)
    if not isinstance(network, bool):
        raise _Rejected(f"isolation.network must be true or false, not {_shown(network)}")
    if network and not allow_network:
        raise _Rejected("network declared but plugins.allow_network=false")
    return PluginRecord(
        name=name,
        version=version,
        package_path=package,
        module_name=package.name,
        timeout_seconds=_number(isolation, "timeout_seconds", 30, MAX_TIMEOUT_SECONDS),
        memory_mb=_number(isolation, "memory_mb", 512, MAX_MEMORY_MB),
        supported_extensions=tuple(extensions),
        api_version=api_version,
        network=network,
    )


def _packages(root: Path) -> list[Path]:
    try:
        found = sorted(root.iterdir())
    except OSError as error:
        _logger.warning("a plugin folder cannot be read", extra={"folder": str(root), "reason": str(error)})
        return []
    return [
        place for place in found if place.is_symlink() or (place.is_dir() and not place.name.startswith((".", "__")))
    ]


def _manifest(package: Path) -> dict[str, Any]:
    """Read the file without following a link, whatever somebody put in its place."""
    if package.is_symlink():
        raise _Rejected("malformed manifest: its folder is a symbolic link")
    try:
        descriptor = os.open(package / MANIFEST_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _Rejected(f"missing {MANIFEST_NAME}") from None
    except OSError as error:
        raise _Rejected(f"malformed manifest: it cannot be opened ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Rejected("malformed manifest: it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise _Rejected(f"malformed manifest: it is larger than {MAX_MANIFEST_BYTES} bytes")
    data = _parse(raw)
    if not isinstance(data, dict):
        raise _Rejected("malformed manifest: it is no mapping")
    return data


def _parse(raw: bytes) -> Any:
    """Return what a manifest says."""
    try:
        text = raw.decode("utf-8")
        _refuse_traps(text)
        return yaml.load(text, Loader=_OnceLoader)  # noqa: S506 - a SafeLoader that refuses doubled keys
    except _Rejected:
        raise
    except UnicodeDecodeError:
        raise _Rejected("malformed manifest: it is not UTF-8") from None
    except yaml.YAMLError as error:
        raise _Rejected(f"malformed manifest: {clean_line(str(error).partition(chr(10))[0], 200)}") from error
    except Exception as error:  # a value that is not what its tag says is whatever PyYAML happens to stumble over
        raise _Rejected(f"malformed manifest: a value cannot be read ({type(error).__name__})") from error


def _refuse_traps(text: str) -> None:
    """Refuse what takes hours or gigabytes to read, in a few lines: aliases, and depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise _Rejected("malformed manifest: it uses aliases")
        if depth > _MAX_DEPTH:
            raise _Rejected(f"malformed manifest: it is nested more than {_MAX_DEPTH} deep")


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
        raise _Rejected(f"{key} must be a text, not {_shown(value)}")
    text = value if isinstance(value, str) else _shown(value)
    if not text.isprintable() or len(text) > _MAX_TEXT:
        raise _Rejected(f"{key} must be one printable line of at most {_MAX_TEXT} characters, not {_shown(value)}")
    return text


def _number(isolation: Mapping[str, Any], key: str, default: int, cap: int) -> int:
    value = isolation.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Rejected(f"isolation.{key} must be a whole number, not {_shown(value)}")
    if value > cap:
        raise _Rejected(f"isolation.{key}={_shown(value)} exceeds cap {cap}")
    return max(1, value)
