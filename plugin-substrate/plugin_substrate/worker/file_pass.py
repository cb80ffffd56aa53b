"""Runs a file plugin in its worker: the hooks in their order, from where the last question stopped them.

Three actions: ``validate`` answers ``{"errors": [...]}``; ``run`` and ``resume`` answer a result of the shape below.
The object and what it knows live from one to the next, so that finished files stay finished.

A result is ``{"result", "per_file", "log_records", "input_required", "error_message", "exit_code"}`` with ``result``
one of success, failed and input_required, and ``exit_code`` 0 when all hooks returned, 1 for a `PluginError`, 2 for a
question and 3 for anything else that was raised.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plugin_substrate.errors import PluginConfigError, PluginError
from plugin_substrate.file_plugin import FileChange, FilePlugin, PluginContext, PluginInputRequired
from plugin_substrate.interface import PluginInterface
from plugin_substrate.worker.text import clean_line

__all__ = ["EXTRA_INPUTS_VARIABLE", "FilePassPlugin"]

#: Where plugins of other hosts look for the answers; `PluginContext.extra_inputs` holds the same.
EXTRA_INPUTS_VARIABLE = "__extra_inputs__"

_PATHS = ("dst_root", "answers_file")
_MAX_TEXT = 2000


class FilePassPlugin(PluginInterface):
    """The plugin that the host loads; the real one is a `FilePlugin` from a folder of its own."""

    def __init__(self) -> None:
        self._plugin: FilePlugin | None = None
        self._run: _Run | None = None

    @property
    def name(self) -> str:
        """The plugin's name, as its class gives it."""
        return self._plugin.name if self._plugin else "file-pass"

    @property
    def version(self) -> str:
        """The plugin's version, as its class gives it."""
        return self._plugin.version if self._plugin else ""

    def initialize(self, config: dict[str, Any]) -> None:
        """Import the package in ``folder`` as ``module`` and compare its class with what the manifest says."""
        cls = _import_plugin(Path(config["folder"]), config["module"])
        _cross_check(cls, config)
        self._plugin = cls()

    def execute(self, *, action: str, **request: Any) -> dict[str, Any]:
        """Carry out one of the three actions."""
        if self._plugin is None:
            raise PluginError("nothing was loaded")
        if action == "validate":
            return {"errors": [str(text)[:_MAX_TEXT] for text in self._plugin.validate_variables(request["variables"])]}
        if action == "run":
            context = {**request["context"], "dry_run": request["dry_run"]}
            self._run = _Run(self._plugin, _context(context), request["files"])
        if self._run is None:
            raise PluginError("nothing was asked that could be resumed")
        return self._run.go_on(request["extra_inputs"])


class _Run:
    """The hooks of one run in their order; `go_on` begins with the one that asked."""

    def __init__(self, plugin: FilePlugin, context: PluginContext, files: Sequence[str]) -> None:
        self._plugin = plugin
        self._context = context
        self._per_file: list[dict[str, Any]] = []
        hooks: list[Callable[[PluginContext], None]] = [plugin.pre_transform_all]
        hooks += [self._file_hook(name) for name in files]
        self._left = [*hooks, plugin.post_transform_all]

    def go_on(self, extra_inputs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Call what is left until something is raised."""
        context = self._context
        if extra_inputs is not None:
            variables = {**context.variables, EXTRA_INPUTS_VARIABLE: extra_inputs}
            context = replace(context, variables=variables, extra_inputs=extra_inputs)
        try:
            while self._left:
                self._left[0](context)
                self._left.pop(0)
        except PluginInputRequired as question:
            self._tell(question, context)
            asked = {"fields": question.fields, "reason": question.reason}
            return self._result("input_required", 2, input_required=asked)
        except PluginError as failure:
            self._tell(failure, context)
            return self._result("failed", 1, error_message=str(failure))
        except BaseException as error:  # noqa: BLE001 - whatever foreign code raises is the end of its run alone
            _log_error("plugin lifecycle raised an unhandled exception", error)
            self._tell(error, context)
            text = clean_line(f"{type(error).__name__}: {error}", _MAX_TEXT)
            return self._result("failed", 3, error_message=text)
        return self._result("success", 0)

    def _file_hook(self, name: str) -> Callable[[PluginContext], None]:
        def hook(context: PluginContext) -> None:
            self._handle_file(name, context)

        return hook

    def _handle_file(self, name: str, context: PluginContext) -> None:
        path = context.dst_root / name
        try:
            handles = self._plugin.can_handle(path, context.variables)
        except Exception as error:  # noqa: BLE001 - a filter that breaks fails its file, not the run
            text = clean_line(f"can_handle raised {type(error).__name__}: {error}", _MAX_TEXT)
            self._per_file.append({"path": name, "status": "failed", "changes": None, "error": text})
            return
        if not handles:
            self._per_file.append({"path": name, "status": "skipped", "changes": None})
        elif context.dry_run:
            changes = [_plain_change(change) for change in self._plugin.describe_changes(path, context)]
            self._per_file.append({"path": name, "status": "described", "changes": changes})
        else:
            self._plugin.transform(path, context)
            self._per_file.append({"path": name, "status": "modified", "changes": None})

    def _tell(self, error: BaseException, context: PluginContext) -> None:
        try:
            self._plugin.on_plugin_failure(error, context)
        except Exception as second:  # noqa: BLE001 - the first failure is the one that counts
            _log_error("on_plugin_failure raised; cleanup may be incomplete", second)

    def _result(self, result: str, exit_code: int, **more: Any) -> dict[str, Any]:
        missing: dict[str, Any] = {"log_records": [], "input_required": None, "error_message": None}
        return {"result": result, "exit_code": exit_code, "per_file": self._per_file, **missing, **more}


def _import_plugin(folder: Path, module_name: str) -> type[FilePlugin]:
    """Import a package by its place: what lies beside it cannot take the place of anything."""
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise PluginConfigError(f"{folder} holds no package that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    cls = getattr(module, "Plugin", None)
    if not (isinstance(cls, type) and issubclass(cls, FilePlugin)):
        raise PluginConfigError(f"{module_name} exports no class Plugin that is derived from FilePlugin")
    return cls


def _cross_check(cls: type[FilePlugin], manifest: Mapping[str, Any]) -> None:
    """Refuse code that is not what its manifest says."""
    stated = {
        "name": getattr(cls, "name", None),
        "version": getattr(cls, "version", None),
        "supported_extensions": sorted(getattr(cls, "supported_extensions", ())),
        "api_version": cls.api_version,
    }
    wrong = [
        f"{key} is {value!r} in its class and {manifest[key]!r} in its manifest"
        for key, value in stated.items()
        if value != manifest[key]
    ]
    if wrong:
        raise PluginConfigError("the plugin is not what its manifest says: " + "; ".join(wrong), fields_invalid=[])


def _context(fields: Mapping[str, Any]) -> PluginContext:
    paths = {key: Path(fields[key]) for key in _PATHS if fields[key] is not None}
    return PluginContext(**{**fields, **paths})


def _plain_change(change: FileChange) -> dict[str, Any]:
    if not isinstance(change, FileChange):
        raise TypeError(f"describe_changes must return a list of FileChange, not of {type(change).__name__}")
    return {
        "path": str(change.path),
        "kind": change.kind,
        "summary": str(change.summary)[:_MAX_TEXT],
        "detail": json.loads(json.dumps(change.detail, default=str)),
    }


def _log_error(message: str, error: BaseException) -> None:
    """Write one structured line, as `PluginLog` does."""
    detail = {
        "exception": type(error).__name__,
        "detail": clean_line(str(error), 500),
        "traceback": "".join(traceback.format_exception(error))[-_MAX_TEXT:],
    }
    sys.stderr.write(json.dumps({"level": "ERROR", "message": message, "context": detail}) + "\n")
