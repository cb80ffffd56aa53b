"""What calls really took: one record per instance and configuration, into which every call is folded."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from plugin_substrate.errors import StoreError
from plugin_substrate.hashing import hash_dict_canonical
from plugin_substrate.interface import is_amount
from plugin_substrate.stores.files import PASSAGE, locked, make_private, private_folder

_BUSY_SECONDS = 10.0

#: Sums of usage are kept for the first so many units that a plugin names.
MAX_USAGE_TOTALS = 1000


def add_usage(totals: dict[str, float], usage: Mapping[str, float]) -> None:
    """Add a report to sums. A plugin names units and amounts, so both the number of sums and each sum have an end."""
    for unit, amount in usage.items():
        if unit in totals or len(totals) < MAX_USAGE_TOTALS:
            totals[unit] = min(totals.get(unit, 0.0) + amount, sys.float_info.max)


def compute_config_hash(config: Mapping[str, Any] | None) -> str:
    """Return the digest of an effective configuration; None and an empty one have the same."""
    return hash_dict_canonical(config)


@dataclass(frozen=True, kw_only=True)
class ResourceSample:
    """What one unary call took. None is a figure that nobody could give.

    Memory is in MB of 2**20 bytes. ``memory_mb_peak`` is the highest of the worker's life up to the end of the call, as
    the worker reports it; ``cpu_percent`` is of one processor, over the call.
    """

    plugin_name: str
    instance_id: str
    config_hash: str
    success: bool
    duration_seconds: float
    cpu_percent: float | None = None
    memory_mb_peak: float | None = None
    gpu_memory_mb_peak: float | None = None
    api_usage: Mapping[str, float] = field(default_factory=dict)
    observed_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, kw_only=True)
class EmpiricalResourceRecord:
    """The samples of one instance under one configuration. A mean is over the ``*_samples`` that had the figure."""

    instance_id: str
    config_hash: str
    plugin_name: str
    sample_count: int
    success_count: int
    duration_seconds_mean: float
    cpu_samples: int = 0
    cpu_percent_mean: float | None = None
    memory_samples: int = 0
    memory_mb_peak_max: float | None = None
    memory_mb_peak_mean: float | None = None
    gpu_samples: int = 0
    gpu_memory_mb_peak_max: float | None = None
    gpu_memory_mb_peak_mean: float | None = None
    last_observed: datetime
    api_usage_totals: Mapping[str, float] = field(default_factory=dict)

    @property
    def success_rate(self) -> float:
        """The share of calls that gave a result, 0 to 1."""
        return self.success_count / self.sample_count

    @classmethod
    def of(cls, *samples: ResourceSample) -> EmpiricalResourceRecord:
        """Return the record of samples, at least one, all of one instance and configuration."""
        first, count = samples[0], len(samples)
        cpu = [sample.cpu_percent for sample in samples if sample.cpu_percent is not None]
        memory = [sample.memory_mb_peak for sample in samples if sample.memory_mb_peak is not None]
        gpu = [sample.gpu_memory_mb_peak for sample in samples if sample.gpu_memory_mb_peak is not None]
        usage: dict[str, float] = {}
        for sample in samples:
            add_usage(usage, sample.api_usage)
        return cls(
            instance_id=first.instance_id,
            config_hash=first.config_hash,
            plugin_name=samples[-1].plugin_name,
            sample_count=count,
            success_count=sum(sample.success for sample in samples),
            duration_seconds_mean=sum(sample.duration_seconds for sample in samples) / count,
            cpu_samples=len(cpu),
            cpu_percent_mean=_average(cpu),
            memory_samples=len(memory),
            memory_mb_peak_max=max(memory, default=None),
            memory_mb_peak_mean=_average(memory),
            gpu_samples=len(gpu),
            gpu_memory_mb_peak_max=max(gpu, default=None),
            gpu_memory_mb_peak_mean=_average(gpu),
            last_observed=max(sample.observed_at for sample in samples),
            api_usage_totals=usage,
        )

    def combined(self, other: EmpiricalResourceRecord) -> EmpiricalResourceRecord:
        """Return the record of the samples of both, which are of one instance and configuration."""
        usage = dict(self.api_usage_totals)
        add_usage(usage, other.api_usage_totals)
        return EmpiricalResourceRecord(
            instance_id=self.instance_id,
            config_hash=self.config_hash,
            plugin_name=other.plugin_name,
            sample_count=self.sample_count + other.sample_count,
            success_count=self.success_count + other.success_count,
            duration_seconds_mean=_mean(
                (self.sample_count, self.duration_seconds_mean), (other.sample_count, other.duration_seconds_mean)
            )
            or 0.0,
            cpu_samples=self.cpu_samples + other.cpu_samples,
            cpu_percent_mean=_mean(
                (self.cpu_samples, self.cpu_percent_mean), (other.cpu_samples, other.cpu_percent_mean)
            ),
            memory_samples=self.memory_samples + other.memory_samples,
            memory_mb_peak_max=_highest(self.memory_mb_peak_max, other.memory_mb_peak_max),
            memory_mb_peak_mean=_mean(
                (self.memory_samples, self.memory_mb_peak_mean), (other.memory_samples, other.memory_mb_peak_mean)
            ),
            gpu_samples=self.gpu_samples + other.gpu_samples,
            gpu_memory_mb_peak_max=_highest(self.gpu_memory_mb_peak_max, other.gpu_memory_mb_peak_max),
            gpu_memory_mb_peak_mean=_mean(
                (self.gpu_samples, self.gpu_memory_mb_peak_mean), (other.gpu_samples, other.gpu_memory_mb_peak_mean)
            ),
            last_observed=max(self.last_observed, other.last_observed),
            api_usage_totals=usage,
        )


class EmpiricalResourceStore(Protocol):
    """Where records are kept. A file that cannot be used is a `StoreError`. Any thread may call."""

    def add(self, records: Sequence[EmpiricalResourceRecord]) -> None:
        """Fold records into those that are kept, all of them or none."""
        ...

    def get(self, instance_id: str, config_hash: str) -> EmpiricalResourceRecord | None:
        """Return one record, None when there is none."""
        ...

    def list_all(self) -> list[EmpiricalResourceRecord]:
        """Return all records, by instance id and digest."""
        ...


class InMemoryEmpiricalResourceStore:
    """Keeps records for as long as the process runs."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], EmpiricalResourceRecord] = {}

    def add(self, records: Sequence[EmpiricalResourceRecord]) -> None:
        """Fold records into those that are kept."""
        for record in records:
            key = (record.instance_id, record.config_hash)
            kept = self._records.get(key)
            self._records[key] = kept.combined(record) if kept else record

    def get(self, instance_id: str, config_hash: str) -> EmpiricalResourceRecord | None:
        """Return one record, None when there is none."""
        return self._records.get((instance_id, config_hash))

    def list_all(self) -> list[EmpiricalResourceRecord]:
        """Return all records, by instance id and digest."""
        return [record for _, record in sorted(self._records.items())]


class LocalEmpiricalResourceStore:
    """Keeps records in one SQLite file, made at the first write; any number of processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, records: Sequence[EmpiricalResourceRecord]) -> None:
        """Fold records into those that are kept, in one transaction."""
        if not records:
            return
        try:
            private_folder(self._path.parent, PASSAGE)
        except OSError as error:
            raise self._error(error) from error
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")  # nobody else may fold between our reading and our writing
            for record in records:
                kept = _find(connection, record.instance_id, record.config_hash)
                connection.execute(_PUT, _row(kept.combined(record) if kept else record))

    def get(self, instance_id: str, config_hash: str) -> EmpiricalResourceRecord | None:
        """Return one record, None when there is none."""
        if not self._path.exists():
            return None
        with self._connection() as connection:
            return _find(connection, instance_id, config_hash)

    def list_all(self) -> list[EmpiricalResourceRecord]:
        """Return all records, by instance id and digest."""
        if not self._path.exists():
            return []
        with self._connection() as connection:
            return [_record(row) for row in connection.execute(f"{_SELECT} ORDER BY instance_id, config_hash")]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """One connection per operation, committed at its end; the file is nobody else's to read."""
        try:
            make_private(self._path, 0o600)
            if not self._path.exists():
                self._path.touch(mode=0o600)
            with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS)) as connection:
                self._prepare(connection)
                connection.execute("PRAGMA synchronous=NORMAL")  # the last moments before a power cut may be lost
                with connection:
                    yield connection
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise self._error(error) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make or complete the table; one process at a time, as switching to WAL does not wait for others."""
        if set(_ALL) <= _present(connection):
            return
        with locked(self._path.with_name(f"{self._path.name}.lock")):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_CREATE)
            for name in set(_LATER_COLUMNS) - _present(connection):
                connection.execute(f"ALTER TABLE empirical_resources ADD COLUMN {name} {_LATER_COLUMNS[name]}")

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"the measurements in {self._path} cannot be used: {error}", path=str(self._path))


_COLUMNS = {
    "instance_id": "TEXT NOT NULL",
    "config_hash": "TEXT NOT NULL",
    "plugin_name": "TEXT NOT NULL",
    "sample_count": "INTEGER NOT NULL",
    "success_count": "INTEGER NOT NULL",
    "duration_seconds_mean": "REAL NOT NULL",
    "cpu_percent_mean": "REAL",
    "memory_mb_peak_max": "REAL",
    "memory_mb_peak_mean": "REAL",
    "gpu_memory_mb_peak_max": "REAL",
    "gpu_memory_mb_peak_mean": "REAL",
    "last_observed": "TEXT NOT NULL",
}
#: Added in place to files that were made without them.
_LATER_COLUMNS = {
    "api_usage_totals": "TEXT",
    "cpu_samples": "INTEGER",
    "memory_samples": "INTEGER",
    "gpu_samples": "INTEGER",
}
_ALL = {**_COLUMNS, **_LATER_COLUMNS}
_CREATE = f"""CREATE TABLE IF NOT EXISTS empirical_resources (
{", ".join(f"{name} {kind}" for name, kind in _ALL.items())}, PRIMARY KEY (instance_id, config_hash))"""
_SELECT = f"SELECT {', '.join(_ALL)} FROM empirical_resources"  # noqa: S608 - our own names
_PUT = f"INSERT OR REPLACE INTO empirical_resources ({', '.join(_ALL)}) VALUES ({', '.join('?' * len(_ALL))})"  # noqa: S608 - our own names
_MEANS = {
    "cpu_samples": "cpu_percent_mean",
    "memory_samples": "memory_mb_peak_mean",
    "gpu_samples": "gpu_memory_mb_peak_mean",
}


def _present(connection: sqlite3.Connection) -> set[str]:
    return {row[1] for row in connection.execute("PRAGMA table_info(empirical_resources)")}


def _find(connection: sqlite3.Connection, instance_id: str, config_hash: str) -> EmpiricalResourceRecord | None:
    row = connection.execute(f"{_SELECT} WHERE instance_id = ? AND config_hash = ?", (instance_id, config_hash))
    found = row.fetchone()
    return _record(found) if found else None


def _row(record: EmpiricalResourceRecord) -> tuple[Any, ...]:
    values = {each.name: getattr(record, each.name) for each in fields(record)}
    values["last_observed"] = record.last_observed.isoformat()
    values["api_usage_totals"] = json.dumps(dict(record.api_usage_totals), allow_nan=False)
    return tuple(values[name] for name in _ALL)


def _record(row: tuple[Any, ...]) -> EmpiricalResourceRecord:
    values = dict(zip(_ALL, row, strict=True))
    values["last_observed"] = datetime.fromisoformat(values["last_observed"])
    usage = json.loads(values["api_usage_totals"] or "{}")
    values["api_usage_totals"] = {unit: amount for unit, amount in usage.items() if is_amount(amount)}
    for count, mean in _MEANS.items():
        if values[count] is None:  # a row of a file that did not count them apart
            values[count] = 0 if values[mean] is None else values["sample_count"]
    return EmpiricalResourceRecord(**values)


def _mean(*parts: tuple[int, float | None]) -> float | None:
    known = [(count, mean) for count, mean in parts if count and mean is not None]
    total = sum(count for count, _ in known)
    return sum(count * mean for count, mean in known) / total if total else None


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _highest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)
