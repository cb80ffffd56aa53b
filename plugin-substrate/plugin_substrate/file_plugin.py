"""What the author of a file plugin sees: the class to derive from and what surrounds a pass. Standard library only.

A file plugin edits the files of one folder. It works on a copy of that folder, in a process of its own; when its hooks
have returned and it kept the rules, the host carries its changes over. Its package is a folder with a ``manifest.yml``
and an ``__init__.py`` that exports a class ``Plugin``, derived from `FilePlugin`.

The order of one run: ``pre_transform_all``, then for each file ``can_handle`` and ``transform`` (in a dry run
``describe_changes``), then ``post_transform_all``. One object serves the whole run.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from plugin_substrate.errors import PluginError

__all__ = ["FileChange", "FilePlugin", "PluginContext", "PluginError", "PluginInputRequired", "PluginLog"]

#: Kinds of `FileChange`.
CHANGE_KINDS = ("modify", "create", "rename", "delete")

_MAX_LOG_CHARACTERS = 2000  # a line of JSON must stay below what a log line may hold, whatever is escaped


@dataclass(frozen=True)
class FileChange:
    """One change that a dry run announces; ``kind`` is modify, create, rename or delete."""

    path: str
    kind: str
    summary: str
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in CHANGE_KINDS:
            raise ValueError(f"FileChange.kind must be one of {', '.join(CHANGE_KINDS)}, not {self.kind!r:.80}")


class PluginInputRequired(PluginError):
    """Raised by a hook that needs to ask somebody: the hook is called again when the answers are there.

    Each of ``fields`` is an object with id, label, type, required and, for a choice, choices. Ask before you edit: the
    hook that raised runs once more from its start, and finds the files as it left them.
    """

    wire_fields = ("fields", "reason")

    def __init__(self, fields: Sequence[Mapping[str, Any]] = (), reason: str = "", **options: Any) -> None:
        super().__init__(reason or "input is required", **options)
        self.fields = [dict(entry) for entry in fields]
        self.reason = reason


class PluginLog:
    """Writes structured lines: one JSON object each, on standard error. Long messages and fields are cut."""

    def debug(self, message: str, **fields: Any) -> None:
        """Say what helps the author."""
        self._write("DEBUG", message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """Say what happened."""
        self._write("INFO", message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Say what may be wrong."""
        self._write("WARNING", message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Say what is wrong."""
        self._write("ERROR", message, fields)

    def _write(self, level: str, message: str, fields: Mapping[str, Any]) -> None:
        line: dict[str, Any] = {"level": level, "message": str(message)[:_MAX_LOG_CHARACTERS]}
        context = {str(key)[:100]: _plain(value) for key, value in list(fields.items())[:20]}
        if context and len(json.dumps(context)) <= _MAX_LOG_CHARACTERS:
            line["context"] = context
        elif context:
            line["context"] = {"cut": "the fields of this line are too large"}
        sys.stderr.write(json.dumps(line) + "\n")


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int) else str(value)[:_MAX_LOG_CHARACTERS]


@dataclass(frozen=True)
class PluginContext:
    """What a pass is about. In a plugin ``dst_root`` is the copy it works on, and never the folder itself.

    ``run_kind`` is ``experimental``, ``test`` or empty. ``extra_inputs`` holds the answers to the plugin's last
    question: None before any, and an empty mapping when nothing was filled in.
    """

    variables: Mapping[str, Any]
    dst_root: Path
    answers_file: Path | None = None
    template_name: str = ""
    template_version: str = ""
    run_kind: str = ""
    equipment_id: str = ""
    project: str = ""
    dry_run: bool = False
    log: PluginLog = field(default_factory=PluginLog, repr=False, compare=False)
    extra_inputs: Mapping[str, Any] | None = None


class FilePlugin(ABC):
    """Base class of every file plugin. The attributes must equal the manifest: a run of one that differs fails."""

    name: ClassVar[str]
    version: ClassVar[str]
    supported_extensions: ClassVar[Sequence[str]]
    api_version: ClassVar[str] = "1"
    required_variables: ClassVar[Sequence[str]] = ()
    optional_variables: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def can_handle(self, file_path: Path, variables: Mapping[str, Any]) -> bool:
        """Tell whether to transform a file; cheap, and without effects. When it raises, that file alone fails."""

    @abstractmethod
    def transform(self, file_path: Path, ctx: PluginContext) -> object:
        """Edit the file in place; what is returned is ignored."""

    def validate_variables(self, variables: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the variables; unless overridden, each required one that is missing or empty."""
        missing = [name for name in self.required_variables if not variables.get(name)]
        return [f"required variable '{name}' is missing or empty" for name in missing]

    def pre_transform_all(self, ctx: PluginContext) -> None:  # noqa: B027 - an optional hook
        """Prepare, once before the first file."""

    def post_transform_all(self, ctx: PluginContext) -> None:  # noqa: B027 - an optional hook
        """Finish, once after the last file; not called when something raised before."""

    def describe_changes(self, file_path: Path, ctx: PluginContext) -> list[FileChange]:
        """Say what `transform` would do, without doing it."""
        path = file_path.relative_to(ctx.dst_root).as_posix()
        return [FileChange(path=path, kind="modify", summary=f"{self.name} would modify {path}")]

    def on_plugin_failure(self, exc: BaseException, ctx: PluginContext) -> None:  # noqa: B027 - an optional hook
        """Clean up after anything that a hook raised, a question included; what this raises is only logged."""
