"""What a pass is given and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "UNFINISHED",
    "InputDeclined",
    "InputRequiredPayload",
    "PassLimits",
    "PluginPassResult",
    "PluginRecord",
    "PluginRegistryProtocol",
    "PluginStatus",
    "ProtectedPaths",
]

#: The folder at the top of a tree in which changes wait while they are carried over. It is nobody else's.
UNFINISHED = ".file-pass-unfinished"


class PluginStatus(StrEnum):
    """How one plugin's part of a pass ended."""

    SUCCESS = "success"  #: it changed something, and the changes were carried over
    SKIPPED = "skipped"  #: nothing was to be done, or nothing was changed
    FAILED = "failed"  #: nothing was carried over
    TIMEOUT = "timeout"  #: it took too long; nothing was carried over
    POLICY_VIOLATION = "policy_violation"  #: it changed what it may not; nothing was carried over


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """A file plugin that a registry offers. Sizes are mebibytes."""

    name: str
    version: str
    package_path: Path
    module_name: str
    timeout_seconds: int = 30
    memory_mb: int = 512
    supported_extensions: tuple[str, ...] = ()
    api_version: str = "1"
    network: bool = False

    def supports(self, path: str) -> bool:
        """Whether a file's last suffix, or its whole name when it has none, is one of ours; case does not matter."""
        name = path.rpartition("/")[2]
        suffix = Path(name).suffix or name
        return suffix.lower() in {extension.lower() for extension in self.supported_extensions}


class PluginRegistryProtocol(Protocol):
    """Where a host finds its plugins."""

    def get_record(self, name: str) -> PluginRecord | None:
        """Return the plugin of this name, None when there is none."""
        ...

    def list_all(self) -> Sequence[PluginRecord]:
        """Return every plugin, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class ProtectedPaths:
    """What no plugin may create, change or delete, at the top of the tree: exact names, and whole folders."""

    names: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()

    @property
    def tops(self) -> frozenset[str]:
        """All that is protected, by name."""
        return self.names | self.folders | {UNFINISHED}

    def covers(self, path: str) -> bool:
        """Whether a path, relative to the tree and with slashes, is protected, as `UNFINISHED` always is."""
        top = path.partition("/")[0]
        return path in self.names or top in self.folders or top == UNFINISHED


@dataclass(frozen=True, kw_only=True)
class PassLimits:
    """Bounds of one pass; sizes are bytes. A tree beyond the first three is worked on in place, see `PluginHost`."""

    staged_files: int = 50_000
    staged_bytes: int = 4 << 30
    file_bytes: int = 1 << 30
    tree_depth: int = 100
    growth_bytes: int = 1 << 30  #: how much larger than it was a plugin may make the tree
    frame_bytes: int = 1 << 20  #: request and result, each as JSON
    log_bytes: int = 8 << 20  #: of one plugin's log file
    questions: int = 20  #: of one plugin in one pass
    answer_seconds: float = 3600.0  #: for each question


@dataclass(frozen=True, kw_only=True)
class InputRequiredPayload:
    """A plugin's question. Each of ``fields`` has id, label, type and required, and may have choices."""

    plugin: str
    fields: tuple[Mapping[str, Any], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class InputDeclined:
    """An answer: this question will not be answered. Its plugin fails, and the pass goes on. None cancels the pass."""


@dataclass(frozen=True, kw_only=True)
class PluginPassResult:
    """How a pass ended: ``applied`` has a record for each plugin; ``aborted`` only after a question was cancelled.

    A record has plugin, version, files_affected (relative paths, sorted), status and isolation (duration_ms, exit_code,
    peak_memory_mb, layers, staging); and where it applies error, violations, crash, per_file and log.
    """

    applied: list[dict[str, Any]] = field(default_factory=list)
    aborted: bool = False

    def to_json(self) -> list[dict[str, Any]]:
        """Return the records as they are stored for good: without error, violations and what readers may do without."""
        kept = ("plugin", "version", "files_affected", "status")
        numbers = ("duration_ms", "exit_code", "peak_memory_mb")
        return [
            {**{key: record[key] for key in kept}, "isolation": {key: record["isolation"][key] for key in numbers}}
            for record in self.applied
        ]
