"""A registry of file plugins for tests: the packages that are named, and no others."""

from __future__ import annotations

from pathlib import Path

from plugin_substrate.passes.manifest import load_record
from plugin_substrate.passes.records import PluginRecord

__all__ = ["registry_of"]


class _Registry:
    def __init__(self, records: dict[str, PluginRecord]) -> None:
        self._records = records

    def get_record(self, name: str) -> PluginRecord | None:
        return self._records.get(name)

    def list_all(self) -> list[PluginRecord]:
        return [self._records[name] for name in sorted(self._records)]


def registry_of(*packages: Path, allow_network: bool = False) -> _Registry:
    """Return a registry of these package folders, for `PluginHost`; a ValueError names what is wrong with one."""
    records = [load_record(package, allow_network=allow_network) for package in packages]
    return _Registry({record.name: record for record in records})
