"""Configurations that outlive the host: of each plugin's default instance, with whether it is enabled."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from plugin_substrate.errors import StoreError
from plugin_substrate.stores.files import PASSAGE, locked, make_private

_BUSY_SECONDS = 10.0
_TABLE = """
CREATE TABLE IF NOT EXISTS plugin_configs (
    plugin_name TEXT PRIMARY KEY,
    config_json TEXT NOT NULL,
    enabled INTEGER NOT NULL DEFAULT 1,
    updated_at REAL NOT NULL
)
"""
_PUT = """
INSERT INTO plugin_configs (plugin_name, config_json, enabled, updated_at) VALUES (?, ?, ?, ?)
ON CONFLICT (plugin_name) DO UPDATE
SET config_json = excluded.config_json, enabled = excluded.enabled, updated_at = excluded.updated_at
"""


@dataclass(frozen=True, kw_only=True)
class PluginConfigRecord:
    """What is kept of a plugin. ``updated_at`` is a Unix time in seconds, stamped when it is written."""

    plugin_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True
    updated_at: float = 0.0


class PluginConfigStore(Protocol):
    """Where configurations are kept. A file that cannot be used is a `StoreError`."""

    def get(self, plugin_name: str) -> PluginConfigRecord | None:
        """Return a plugin's record, None when there is none."""
        ...

    def set(self, record: PluginConfigRecord) -> None:
        """Keep a record in the place of the one before it. A configuration that is not JSON is a ValueError."""
        ...

    def delete(self, plugin_name: str) -> bool:
        """Forget a record; False when there is none."""
        ...

    def list_all(self) -> list[PluginConfigRecord]:
        """Return all records, by plugin name."""
        ...


class InMemoryPluginConfigStore:
    """Keeps configurations for as long as the process runs."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, str, bool, float]] = {}

    def get(self, plugin_name: str) -> PluginConfigRecord | None:
        """Return a plugin's record, None when there is none."""
        row = self._rows.get(plugin_name)
        return _record(row, "the store in memory") if row else None

    def set(self, record: PluginConfigRecord) -> None:
        """Keep a record in the place of the one before it."""
        self._rows[record.plugin_name] = _row(record)

    def delete(self, plugin_name: str) -> bool:
        """Forget a record; False when there is none."""
        return self._rows.pop(plugin_name, None) is not None

    def list_all(self) -> list[PluginConfigRecord]:
        """Return all records, by plugin name."""
        return [_record(row, "the store in memory") for _, row in sorted(self._rows.items())]


class LocalPluginConfigStore:
    """Keeps configurations in one SQLite file, made at the first write; any number of processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, plugin_name: str) -> PluginConfigRecord | None:
        """Return a plugin's record, None when there is none."""
        rows = self._select("WHERE plugin_name = ?", plugin_name)
        return rows[0] if rows else None

    def set(self, record: PluginConfigRecord) -> None:
        """Keep a record in the place of the one before it."""
        row = _row(record)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=PASSAGE)
        except OSError as error:
            raise self._error(error) from error
        with self._connection() as connection:
            connection.execute(_PUT, row)

    def delete(self, plugin_name: str) -> bool:
        """Forget a record; False when there is none."""
        if not self._path.exists():
            return False
        with self._connection() as connection:
            return connection.execute("DELETE FROM plugin_configs WHERE plugin_name = ?", (plugin_name,)).rowcount > 0

    def list_all(self) -> list[PluginConfigRecord]:
        """Return all records, by plugin name."""
        return self._select("ORDER BY plugin_name")

    def _select(self, clause: str, *values: str) -> list[PluginConfigRecord]:
        if not self._path.exists():
            return []
        statement = f"SELECT plugin_name, config_json, enabled, updated_at FROM plugin_configs {clause}"  # noqa: S608 - ours
        with self._connection() as connection:
            return [_record(row, str(self._path)) for row in connection.execute(statement, values)]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One connection per operation, committed at its end; the file is nobody else's to read."""
        try:
            make_private(self._path, 0o600)
            if not self._path.exists():
                self._path.touch(mode=0o600)
            with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as connection:
                self._prepare(connection)
                with connection:
                    yield connection
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table; one process at a time, as switching to WAL does not wait for others."""
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'plugin_configs'").fetchone():
            return
        with locked(self._path.with_name(f"{self._path.name}.lock")):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_TABLE)

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"the configurations in {self._path} cannot be used: {error}", path=str(self._path))


def _row(record: PluginConfigRecord) -> tuple[str, str, bool, float]:
    try:
        text = json.dumps(dict(record.config), allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the configuration of {record.plugin_name!r} is not JSON: {error}") from error
    return record.plugin_name, text, record.enabled, time.time()


def _record(row: tuple[str, str, int, float], place: str) -> PluginConfigRecord:
    """Read a row; a configuration that cannot be read must not pass for an empty one."""
    name, text, enabled, updated_at = row
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise StoreError(
            f"the configuration of {name!r} in {place} is not a JSON object; delete it, or update the configuration",
            path=place,
        )
    return PluginConfigRecord(plugin_name=name, config=config, enabled=bool(enabled), updated_at=updated_at)
