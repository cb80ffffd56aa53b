"""One plugin's part of a pass while it happens, and the record it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plugin_substrate.errors import PluginError, PluginTimeoutError, WireValueError, WorkerDiedError, WorkerOOMError
from plugin_substrate.passes.changes import Changes
from plugin_substrate.passes.pass_worker import PassWorker
from plugin_substrate.passes.records import PluginRecord, PluginStatus
from plugin_substrate.worker.text import clean_line

__all__ = ["EXIT_FAILED", "EXIT_HOST", "EXIT_INPUT_REQUIRED", "EXIT_TIMEOUT", "Part"]

#: Exit codes of a record besides 0: a planned failure, a question, a crash or a refusal of the host, and too much time.
EXIT_FAILED, EXIT_INPUT_REQUIRED, EXIT_HOST, EXIT_TIMEOUT = 1, 2, 3, 124

_MAX_ERROR = 2000
_MAX_VIOLATIONS = 1000
_SILENT = ("modified", "skipped")


@dataclass(kw_only=True)
class Part:
    """What is known so far; `SKIPPED` until something else is."""

    name: str
    record: PluginRecord | None
    status: PluginStatus = PluginStatus.SKIPPED
    exit_code: int = 0
    error: str = ""
    crash: bool = False
    staging: str = ""
    files_affected: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    per_file: list[Mapping[str, Any]] = field(default_factory=list)
    layers: tuple[str, ...] = ()
    worked_seconds: float = 0.0
    peak_bytes: float = 0.0

    def fail(self, exit_code: int, error: str, *, crash: bool = False) -> None:
        """Note a failure; the first one stays."""
        if self.status is PluginStatus.SKIPPED:
            self.status = PluginStatus.FAILED
            self.exit_code, self.error, self.crash = exit_code, clean_line(error, _MAX_ERROR), crash

    def fail_with(self, error: PluginError) -> None:
        """Note how a worker failed: too slow, dead, or an error of the plugin outside of its hooks."""
        if isinstance(error, PluginTimeoutError):
            self.fail(EXIT_TIMEOUT, "timeout")
            self.status = PluginStatus.TIMEOUT
        elif isinstance(error, WorkerOOMError):
            self.fail(error.process_returncode or EXIT_HOST, str(error))
        elif isinstance(error, WorkerDiedError):
            self.fail(EXIT_HOST if error.returncode is None else error.returncode, str(error))
        else:
            of_caller = isinstance(error, WireValueError) and error.of_caller
            self.fail(EXIT_HOST, str(error), crash=not of_caller and not str(error).startswith("spawn_failed"))

    def heard(self, result: Mapping[str, Any]) -> None:
        """Take over what a worker said of its run."""
        self.exit_code = result["exit_code"]
        self.per_file = [entry for entry in result["per_file"] if entry["status"] not in _SILENT]
        broken = next((entry["error"] for entry in self.per_file if isinstance(entry.get("error"), str)), "")
        if result["result"] == "failed":
            reason = str(result.get("error_message") or "it gave no reason")
            self.fail(self.exit_code, reason, crash=self.exit_code == EXIT_HOST)
        elif result["result"] == "success":
            self.error = clean_line(broken, _MAX_ERROR)

    def violated(self, changes: Changes) -> None:
        """Note violations, which count for more than everything else."""
        self.status = PluginStatus.POLICY_VIOLATION
        self.violations = list(changes.violations)[:_MAX_VIOLATIONS]
        self.files_affected = list(self.violations)
        reasons = "; ".join(f"{path} {reason}" for path, reason in changes.violations.items())
        self.error = clean_line(reasons, _MAX_ERROR)

    def changed(self, changes: Changes) -> None:
        """Note what was carried over."""
        if changes:
            self.status = PluginStatus.SUCCESS
            self.files_affected = changes.files

    def count(self, worker: PassWorker) -> None:
        """Add what a worker took, and what confined it."""
        self.worked_seconds += worker.worked_seconds
        self.peak_bytes = max(self.peak_bytes, worker.peak_bytes)
        self.layers = worker.layers or self.layers

    def applied(self) -> dict[str, Any]:
        """Return the record of ``plugins_applied``; see `PluginPassResult`."""
        isolation: dict[str, Any] = {
            "duration_ms": round(self.worked_seconds * 1000),
            "exit_code": self.exit_code,
            "peak_memory_mb": round(self.peak_bytes / (1 << 20)),
            "layers": list(self.layers),
            "staging": self.staging,
        }
        record: dict[str, Any] = {
            "plugin": self.name,
            "version": self.record.version if self.record else "",
            "files_affected": self.files_affected,
            "status": self.status.value,
            "isolation": isolation,
        }
        optional = {
            "error": self.error,
            "violations": self.violations,
            "crash": self.crash,
            "per_file": [dict(entry) for entry in self.per_file],
        }
        return record | {key: value for key, value in optional.items() if value}
