"""Asks an installed distribution about its plugin, inside its own environment, when it is installed.

The answer is one JSON object on a descriptor of its own: ``{"metadata": {...}}`` or ``{"problem": "..."}``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

from plugin_substrate.interface import PluginInterface, collect_plugin_actions
from plugin_substrate.validation import dataclass_to_jsonschema
from plugin_substrate.worker.interpreter import enter_environment
from plugin_substrate.worker.verbs import plain


class _UndescribedError(Exception):
    """The distribution does not follow the convention; the text says how."""


def describe(descriptor: int, distribution: str) -> None:
    """Write what ``get_plugin_metadata()`` of the distribution says, or why it cannot be used."""
    try:
        enter_environment()
        answer = {"metadata": _metadata(distribution)}
        text = json.dumps(answer, allow_nan=False)
    except BaseException as error:  # noqa: BLE001 - it runs foreign code, and its failure is the answer
        foreign = not isinstance(error, _UndescribedError)
        reason = f"{type(error).__name__}: {error}{_place(error)}" if foreign else str(error)
        text = json.dumps({"problem": reason})
    with os.fdopen(descriptor, "w", encoding="utf-8") as answer_file:
        answer_file.write(text)


def _place(error: BaseException) -> str:
    """Return where the plugin's own code was last when it failed."""
    ours = str(Path(__file__).parent.parent)
    calls = traceback.extract_tb(error.__traceback__)
    theirs = [call for call in calls if not call.filename.startswith(("<", ours))]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def _metadata(distribution: str) -> dict[str, Any]:
    module = _meta_module(distribution)
    function = getattr(importlib.import_module(module), "get_plugin_metadata", None)
    if not callable(function):
        raise _UndescribedError(f"{module} has no function get_plugin_metadata()")
    described = function()
    if not isinstance(described, dict):
        raise _UndescribedError(f"{module}.get_plugin_metadata() must return a dict, not {type(described).__name__}")
    cls = _checked_class(described)
    if cls.WORKER_ENV and "worker_env" not in described:
        described = {**described, "worker_env": list(cls.WORKER_ENV)}
    if cls.config_class is not None and "config_schema" not in described:
        described = {**described, "config_schema": dataclass_to_jsonschema(cls.config_class)}
    metadata_of: dict[str, Any] = plain(described)
    return metadata_of


def _meta_module(distribution: str) -> str:
    """Return ``<package>.meta``; an editable installation lists no files, so there the names must agree."""
    files = metadata.distribution(distribution).files or []
    packages = sorted({file.parts[0] for file in files if len(file.parts) == 2 and file.name == "meta.py"})
    if len(packages) > 1:
        raise _UndescribedError(f"{distribution} has several meta modules: {', '.join(packages)}")
    package = packages[0] if packages else re.sub(r"[-_.]+", "_", distribution).lower()
    return f"{package}.meta"


def _checked_class(described: dict[str, Any]) -> type[PluginInterface]:
    """Return the plugin's class. Finds here what would otherwise fail at the first load or call."""
    name = f"{described.get('module')}.{described.get('class')}"
    cls = getattr(importlib.import_module(str(described.get("module"))), str(described.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, PluginInterface)):
        raise _UndescribedError(f"{name} is not a class derived from plugin_substrate.interface.PluginInterface")
    if getattr(cls, "__abstractmethods__", None):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise _UndescribedError(f"{name} does not implement {missing}")
    tagged, declared = collect_plugin_actions(cls), set(described.get("capabilities", ()))
    if tagged and tagged != declared:
        difference = ", ".join(sorted(tagged ^ declared))
        raise _UndescribedError(f"capabilities and the actions of {name} differ in: {difference}")
    return cls
