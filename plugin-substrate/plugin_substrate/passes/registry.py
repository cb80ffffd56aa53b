"""Which file plugins there are: packages below two folders, read without importing any of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plugin_substrate.passes.manifest import RejectedError, load_record
from plugin_substrate.passes.records import PluginRecord

__all__ = ["PluginRegistry", "RegistryReport"]

_logger = logging.getLogger(__name__)


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
            of_root = self._read(root, rejected)
            for name in records.keys() & of_root.keys():
                _logger.info("a plugin of the laboratory replaces the bundled one", extra={"plugin": name})
            records |= of_root
        for package, reason in rejected.items():
            _logger.warning("a plugin package is rejected", extra={"package": str(package), "reason": reason})
        self._records = dict(sorted(records.items()))
        return RegistryReport(loaded=tuple(self._records), rejected=rejected)

    def _read(self, root: Path, rejected: dict[Path, str]) -> dict[str, PluginRecord]:
        """Return the plugins of one folder, and add to ``rejected`` why others are none."""
        found: dict[str, PluginRecord] = {}
        for package in _packages(root):
            try:
                record = load_record(
                    package, supported_api_versions=self._api_versions, allow_network=self._allow_network
                )
            except RejectedError as reason:
                rejected[package] = str(reason)
                continue
            first = found.setdefault(record.name, record)
            if first is not record:
                rejected[package] = f"duplicate name {record.name!r}: {first.package_path.name} has it already"
        return found

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


def _packages(root: Path) -> list[Path]:
    try:
        found = sorted(root.iterdir())
    except OSError as error:
        _logger.warning("a plugin folder cannot be read", extra={"folder": str(root), "reason": str(error)})
        return []
    return [
        place for place in found if place.is_symlink() or (place.is_dir() and not place.name.startswith((".", "__")))
    ]
